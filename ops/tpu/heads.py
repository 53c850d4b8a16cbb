"""The grid of TPU kernels with a matrix state: batch, blocks of heads, chunks of tokens.

Arrays stay as the caller has them, seen as [B, T, H * K]: heads lie side by side along lanes, and a
grid step reads a tile of C tokens and a few heads. That is how projections make them; nothing is
transposed or padded in memory. Rows past T are masked inside the kernel, and a K that is no
multiple of 128 is cut out of its lanes there.

A kernel keeps the states of its heads transposed, Z = S^T [V, K], from the first chunk that it
takes to the last.

**Directions.** A grid walks through time in the direction of the recurrence, from the last token to
the first for an op with `reverse=True`; a backward kernel walks against it (`backward` in the
methods). No array is flipped: index maps count chunks from the other end, and what a kernel asks
about the order of two tokens it asks of their places in the walk (`place`), not of their rows.

Here a step takes a chunk. Where every segment has a state of its own it takes what a segment has in
a chunk (`segments.py`): index maps, and a kernel by its `Step`, then read `SegmentSteps`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .kernel import LANES, Input, Output, Ref
from .matmul import indices

Array = jax.Array | jax.ShapeDtypeStruct  # of which the shape is asked


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes; chosen by the static cycle model of the TPU compiler for v5e and
    v6e.

    chunk: tokens, a power of two from 16 on.
    lanes: of the heads' keys or values, where heads allow it: enough independent heads to fill the
      waiting times of each other, few enough for fast memory.
    live_of_channels: with a decay per channel, the arrays of [C, K] of one head that are alive at
      once besides what there is without (see `fit.py`)."""

    chunk: int = 128
    lanes: int = 512
    live_of_channels: int = 48


@dataclass(frozen=True)
class HeadGrid:
    """The grid (batch, blocks of heads, chunks) of an op with q, k [B, T, HK, K] and v [B, T, H,
    V].

    heads, key_heads: of one step, which has all value heads of its key heads, or some value heads
      of a single key head.
    all_heads, all_key_heads: H and HK.
    chunk: C.
    reverse: whether the recurrence runs from the last token to the first.

    `backward` in the methods: of a backward kernel, which walks against the recurrence."""

    batch: int
    length: int
    all_heads: int
    all_key_heads: int
    key_size: int
    value_size: int
    heads: int
    key_heads: int
    chunk: int
    reverse: bool
    interpret: bool

    dimensions = ("parallel", "parallel", "arbitrary")

    # What index maps and steps read, prefetched; None where they need nothing.
    plan = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.head_blocks, self.steps

    @property
    def head_blocks(self) -> int:
        return self.all_heads // self.heads

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def steps(self) -> int:
        """G', the steps along time."""
        return self.chunks

    @property
    def group(self) -> int:
        """Value heads per key head inside one step."""
        return self.heads // self.key_heads

    @property
    def steps_per_key_head(self) -> int:
        """Blocks of heads that read the same key head; above one, the key head's gradient is a sum
        over steps."""
        return self.head_blocks * self.key_heads // self.all_key_heads

    # --- Tiles

    def of_keys(self, x_BTHK: jax.Array, backward: bool = False) -> Input:
        """C tokens of the step's key heads."""
        return Input(flat(x_BTHK), self._tokens(self.key_heads * self.key_size, True, backward))

    def of_values(self, x_BTHV: jax.Array, backward: bool = False) -> Input:
        """C tokens of the step's value heads."""
        return Input(flat(x_BTHV), self.value_tile(backward))

    def value_tile(self, backward: bool = False) -> pl.BlockSpec:
        """C tokens of the step's heads of [B, T, H * V]."""
        return self._tokens(self.heads * self.value_size, False, backward)

    def decay_tile(self, backward: bool = False) -> pl.BlockSpec:
        """C tokens of the step's heads of [B, T, H * K]."""
        return self._tokens(self.heads * self.key_size, False, backward)

    def key_part_tile(self) -> pl.BlockSpec:
        """C tokens of the step's own part of [B, T, key heads * steps per key head * K], of a
        backward kernel."""
        tile = 1, self.chunk, self.key_heads * self.key_size
        return pl.BlockSpec(tile, lambda b, h, t, *plan: (b, self._chunk(b, t, True, *plan), h))

    def rows_tile(
        self, array: jax.Array | jax.ShapeDtypeStruct, backward: bool = False
    ) -> pl.BlockSpec:
        """One step of [B or 1, blocks of heads or 1, G' or 1, ...]."""
        # Factors of the indices: 0 along an axis of one element, which all steps share.
        batch, blocks, steps = (size > 1 for size in array.shape[:3])
        rest = array.shape[3:]

        def index(b, h, t, *plan):
            del plan
            step_index = self.step_index(t, backward)
            return b * batch, h * blocks, step_index * steps, *(0 for _ in rest)

        return pl.BlockSpec((1, 1, 1, *rest), index)

    def of_rows(self, x_BHT: jax.Array, backward: bool = False) -> Input:
        """[1, 1, 1, heads, C]: one number per token and head, in rows (see `rows`)."""
        rows = self.rows(x_BHT)
        return Input(rows, self.rows_tile(rows, backward))

    def of_state(self, state: jax.Array, backward: bool = False) -> Input:
        """The step's heads."""
        heads = self.all_heads, self.key_size, self.value_size
        return Input(state.reshape(-1, *heads), self.state_tile(backward))

    def state_output(self, backward: bool = False) -> Output:
        """[B, H, K, V] in float32."""
        shape = self.states_per_row * self.batch, self.all_heads, self.key_size, self.value_size
        return Output(jax.ShapeDtypeStruct(shape, jnp.float32), self.state_tile(backward))

    @property
    def states_per_row(self) -> int:
        """States that a row of the batch has, which lie side by side along the batch."""
        return 1

    def state_tile(self, backward: bool = False) -> pl.BlockSpec:
        """The step's heads of [B, H, K, V]."""
        tile = 1, self.heads, self.key_size, self.value_size
        return pl.BlockSpec(
            tile, lambda b, h, t, *plan: (self._state(b, t, backward, *plan), h, 0, 0)
        )

    def chunk_states_output(self) -> Output:
        """The transposed states at the starts of steps, [B, G', H, V, K] in float32."""
        shape = self.batch, self.steps, self.all_heads, self.value_size, self.key_size
        return Output(jax.ShapeDtypeStruct(shape, jnp.float32), self.chunk_states_tile())

    def chunk_states_tile(self, backward: bool = False) -> pl.BlockSpec:
        """The step's heads of one step of [B, G', H, V, K]."""
        tile = 1, 1, self.heads, self.value_size, self.key_size
        return pl.BlockSpec(tile, lambda b, h, t, *plan: (b, self.step_index(t, backward), h, 0, 0))

    def constant(self, array: jax.Array) -> Input:
        """All of an array, fetched once."""
        return Input(array, pl.BlockSpec(array.shape, lambda b, h, t, *plan: (0,) * array.ndim))

    def _tokens(self, lanes: int, key_heads: bool, backward: bool) -> pl.BlockSpec:
        steps = self.steps_per_key_head if key_heads else 1

        def index(b, h, t, *plan):
            return b, self._chunk(b, t, backward, *plan), lax.div(h, jnp.int32(steps))

        return pl.BlockSpec((1, self.chunk, lanes), index)

    def _chunk(self, b: Any, t: Any, backward: bool, *plan: Ref) -> Any:
        """Which chunk step t takes."""
        del b, plan
        return self.step_index(t, backward)

    def _state(self, b: Any, t: Any, backward: bool, *plan: Ref) -> Any:
        """Which state step t goes on with."""
        del t, backward, plan
        return b

    # --- One number per token and head

    def rows(self, x_BHT: jax.Array) -> jax.Array:
        """[B, n heads, T] -> [B, n, G', heads, C] in float32, or [B, 1, G', 1, C] of one head for
        all.

        Padded with zeros. For small arrays only: it moves them."""
        return chunk_rows(x_BHT, self)

    def from_rows(self, x: jax.Array) -> jax.Array:
        """[B, n, G', heads, C] -> [B, n heads, T]: inverse of `rows`."""
        return from_chunk_rows(x, self.length)

    # --- Inside a kernel

    def step_index(self, t: Any, backward: bool = False) -> Any:
        """The place of step t among all steps, in the order of tokens."""
        return self.steps - 1 - t if backward != self.reverse else t

    def step(self, plan: None, backward: bool = False) -> "Step":
        """What the kernel is in now; plan: references of `self.plan`."""
        del plan
        return Step(self, pl.program_id(2), backward)

    def place(self, row: Any, count: int) -> Any:
        """The place in the recurrence's walk, from 0 on, of a row of `count`."""
        return count - 1 - row if self.reverse else row

    def places(self) -> tuple[jax.Array, jax.Array]:
        """The places of the rows and of the columns of a matrix of pairs of tokens, [C, C] each."""
        row, column = (self.place(x, self.chunk) for x in indices(self.chunk, self.chunk))
        return row, column

    def lower(self) -> jax.Array:
        """[C, C], one where the column's token is the row's or comes before it, else zero."""
        # NOTE: a factor, not a `where`: selected zeros would be merged into the operand of a
        # matmul, which libtpu's cycle analysis does not survive on v5e.
        row, column = self.places()
        return (row >= column).astype(jnp.float32)

    def strictly_lower(self) -> jax.Array:
        """[C, C], one where the column's token comes before the row's, else zero."""
        row, column = self.places()
        return (row > column).astype(jnp.float32)

    @property
    def halves(self) -> tuple[int, int]:
        """Which half of a block of rows comes first, and which second."""
        return self.place(0, 2), self.place(1, 2)

    def last(self, x: jax.Array, axis: int) -> jax.Array:
        """The entry of the last token along an axis, which stays: of length 1."""
        size = x.shape[axis]
        start = self.place(size - 1, size)
        return lax.slice_in_dim(x, start, start + 1, axis=axis)

    def key(self, ref: Ref, head: int, valid: jax.Array | None) -> jax.Array:
        """[C, K]: what value head `head` reads of a tile of key heads, zero where no token is."""
        return read(ref, head // self.group, self.key_size, valid)

    def value(self, ref: Ref, head: int, valid: jax.Array | None) -> jax.Array:
        """[C, V]: head `head` of a tile of value heads, zero where no token is."""
        return read(ref, head, self.value_size, valid)

    def states(self) -> Any:
        """Scratch for the carry, [heads, V, K]."""
        return pltpu.VMEM((self.heads, self.value_size, self.key_size), jnp.float32)


@dataclass(frozen=True)
class Step:
    """A step of the grid, inside a kernel."""

    grid: HeadGrid
    t: Any  # its number along time
    backward: bool

    @property
    def first(self) -> Any:
        """Whether the state comes from outside."""
        return self.t == 0

    @property
    def last(self) -> Any:
        """Whether the state is wanted outside."""
        return self.t == self.grid.steps - 1

    def valid(self) -> jax.Array | None:
        """[C, 1], which rows of the chunk the step takes; None where it always takes all."""
        if self.grid.length % self.grid.chunk == 0:
            return None
        row = lax.broadcasted_iota(jnp.int32, (self.grid.chunk, 1), 0)
        chunk_index = self.grid.step_index(self.t, self.backward)
        return chunk_index * self.grid.chunk + row < self.grid.length

    def write(self, ref: Ref, head: int, x: jax.Array) -> None:
        """Writes x [C, size] as head `head` of a tile [1, C, heads * size], in its dtype; rows that
        the step does not take may be anything."""
        write(ref, head, x)

    def load_states(self, Z_ref: Ref, initial_ref: Ref) -> None:
        """Writes the states [1, heads, K, V] to the carry before their first step."""

        @pl.when(self.first)
        def _():
            for h in range(self.grid.heads):
                Z_ref[h] = initial_ref[0, h].astype(jnp.float32).T

    def store_states(self, final_ref: Ref, Z_ref: Ref) -> None:
        """Writes the carry to the states [1, heads, K, V] after their last step."""

        @pl.when(self.last)
        def _():
            for h in range(self.grid.heads):
                final_ref[0, h] = Z_ref[h].T


def cut(q: Array, v: Array, tuning: Tuning, reverse: bool, interpret: bool) -> HeadGrid:
    """The grid for q [B, T, HK, K] and v [B, T, H, V].

    A tile's lanes must be a multiple of 128 or everything; among the numbers of heads that allow
    this it takes the largest within `tuning.lanes`, else the smallest."""
    (batch, length, all_key_heads, key_size), (all_heads, value_size) = q.shape, v.shape[2:]
    group = all_heads // all_key_heads

    def whole_lanes(heads: int) -> bool:
        key_heads = max(1, heads // group)
        fits_keys = key_heads * key_size % LANES == 0 or key_heads == all_key_heads
        return fits_keys and (heads * value_size % LANES == 0 or heads == all_heads)

    candidates = [
        heads
        for heads in range(1, all_heads + 1)
        if all_heads % heads == 0
        and (heads % group == 0 or group % heads == 0)
        and whole_lanes(heads)
    ]
    small = [heads for heads in candidates if heads * max(key_size, value_size) <= tuning.lanes]
    heads = max(small) if small else min(candidates)
    return HeadGrid(
        batch,
        length,
        all_heads,
        all_key_heads,
        key_size,
        value_size,
        heads=heads,
        key_heads=max(1, heads // group),
        chunk=min(tuning.chunk, max(16, 1 << (length - 1).bit_length())),
        reverse=reverse,
        interpret=interpret,
    )


def flat(x_BTHX: jax.Array) -> jax.Array:
    """[B, T, H, X] -> [B, T, H * X], which moves nothing."""
    return x_BTHX.reshape(*x_BTHX.shape[:2], -1)


def flat_shape(x_BTHX: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `flat(x)`."""
    batch, length, heads, size = x_BTHX.shape
    return jax.ShapeDtypeStruct((batch, length, heads * size), x_BTHX.dtype)


def read(ref: Ref, head: int, size: int, valid: jax.Array | None) -> jax.Array:
    """Head `head` [C, size] of a tile [1, C, heads * size]; zeros where `valid` [C, 1] says that
    no token is."""
    x = ref[0, :, head * size : (head + 1) * size]
    return x if valid is None else jnp.where(valid, x.astype(jnp.float32), 0.0).astype(x.dtype)


def write(ref: Ref, head: int, x: jax.Array) -> None:
    """Writes x [C, size] as head `head` of a tile [1, C, heads * size], in its dtype."""
    size = x.shape[1]
    ref[0, :, head * size : (head + 1) * size] = x.astype(ref.dtype)


def chunk_rows(x_BHT: jax.Array, grid: HeadGrid) -> jax.Array:
    """`HeadGrid.rows`, of chunks."""
    batch, all_heads, length = x_BHT.shape
    heads = min(grid.heads, all_heads)
    past = grid.chunks * grid.chunk - length
    x = jnp.pad(x_BHT.astype(jnp.float32), ((0, 0), (0, 0), (0, past)))
    x = x.reshape(batch, all_heads // heads, heads, grid.chunks, grid.chunk)
    return x.transpose(0, 1, 3, 2, 4)


def from_chunk_rows(x: jax.Array, length: int) -> jax.Array:
    """`HeadGrid.from_rows`, of chunks."""
    batch, blocks, chunks, heads, chunk = x.shape
    x = x.transpose(0, 1, 3, 2, 4)
    return x.reshape(batch, blocks * heads, chunks * chunk)[:, :, :length]


def decayed(Z: jax.Array, total: jax.Array | None) -> jax.Array:
    """Z [V, K] times the decay of a chunk, a row [1, K or 1] or None."""
    return Z if total is None else Z * total
