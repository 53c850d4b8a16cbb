"""What the TPU kernels of elementwise recurrences share: channels along lanes, tokens in rows,
chunks of them in order.

**Layout.** Arrays stay as the caller has them, [B, T, D], D padded to whole lanes where it is none
(no published model has such a D). A grid step (sequence, chunk, block of channels) reads a
rectangle of C tokens and L channels. The blocks of a chunk follow each other, so that what all
channels share is prepared once per chunk and sums over channels need no memory outside the kernel.
What must outlive a chunk, the states and sums over time, stays in fast memory for a whole sequence,
as an output block that is written back at its end.

**Rows.** Tokens are taken one after another. A row of 8 is loaded with its sublanes repeated or
spread, which is free; so a chunk is first cast to float32 and kept as [C / 8, 8, L], whose rows
have static places in a group of 8."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..framework import segments
from .blocks import LANES, VMEM_BYTES

SUBLANES = 8


@dataclass(frozen=True)
class Blocks:
    """The grid (batch, chunks of C tokens, blocks of L channels) over arrays [B, T, width]."""

    batch: int
    length: int
    width: int
    chunk: int
    lanes: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.chunks, self.width // self.lanes

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def tiles(self) -> tuple[slice, ...]:
        """The block's channels, 128 at a time."""
        return tuple(slice(i, i + LANES) for i in range(0, self.lanes, LANES))

    def places(self, block: Any) -> tuple[Any, list[Any]]:
        """Where a block, and where each of its tiles, lies among all channels."""
        starts = [block * self.lanes + tile.start for tile in self.tiles]
        tiles = [pl.ds(pl.multiple_of(start, LANES), LANES) for start in starts]
        return pl.ds(pl.multiple_of(starts[0], LANES), self.lanes), tiles

    def tokens(self, reverse: bool = False) -> pl.BlockSpec:
        """A chunk of a block of [B, T, width]."""
        return pl.BlockSpec(
            (1, self.chunk, self.lanes), lambda b, t, d: (b, self._at(t, reverse), d)
        )

    def shared(
        self, array: jax.Array | jax.ShapeDtypeStruct, reverse: bool = False
    ) -> pl.BlockSpec:
        """A chunk of [B, chunks, ...], the same for all channels."""
        rest = array.shape[2:]
        return pl.BlockSpec(
            (1, 1, *rest), lambda b, t, d: (b, self._at(t, reverse), *(0 for _ in rest))
        )

    def chunk_states(self, rows: int, reverse: bool = False, count: int = 1) -> pl.BlockSpec:
        """One chunk and block of [B, chunks, rows, width], or of `count` times the chunks."""
        return pl.BlockSpec(
            (1, count, rows, self.lanes), lambda b, t, d: (b, self._at(t, reverse), 0, d)
        )

    def sequence(self, rows: int) -> pl.BlockSpec:
        """All of one sequence of [B, rows, width], in fast memory until its last step."""
        return pl.BlockSpec((1, rows, self.width), lambda b, t, d: (b, 0, 0))

    def constant(self, rows: int) -> pl.BlockSpec:
        """All of [rows, width], fetched once."""
        return pl.BlockSpec((rows, self.width), lambda b, t, d: (0, 0))

    def read(self, ref: Any, chunk_index: Any) -> jax.Array:
        """A chunk [C, L] in float32; zeros where no token is."""
        return self.of_tokens(ref[0].astype(jnp.float32), chunk_index)

    def of_tokens(self, x: jax.Array, chunk_index: Any) -> jax.Array:
        """x [C, L], zero where no token is."""
        if self.length % self.chunk == 0:
            return x
        rows = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(chunk_index * self.chunk + rows < self.length, x, 0.0)

    def groups(self, x: jax.Array) -> jax.Array:
        """[C, L] -> [C / 8, 8, L]."""
        return x.reshape(self.chunk // SUBLANES, SUBLANES, self.lanes)

    def group_scratch(self, before: int = 0) -> Any:
        """For the groups of a chunk, and `before` of them before it."""
        groups = before + self.chunk // SUBLANES
        return pltpu.VMEM((groups, SUBLANES, self.lanes), jnp.float32)

    def loop(
        self,
        token: Callable[[Any, Any, Any], Any],
        carry: Any,
        *,
        end: Callable[[Any], None] = lambda group: None,
        reverse: bool = False,
        stretch: int = 1,
        part: tuple[Any, int] | None = None,
        compiled: bool,
    ) -> Any:
        """carry = token(group, row, carry) for the chunk's tokens in order, and end(group) after
        each 8; part: first group and number of groups, None for all.

        Compiled, rows are constants, and `stretch` groups are one piece of code, to fill each
        other's waiting times; interpreted, loops stay loops, because a CPU's compiler takes long
        over such pieces."""
        first, groups = part or (0, self.chunk // SUBLANES)
        last = SUBLANES - 1

        def group(step, carry):
            g = first + (groups - 1 - step if reverse else step)
            carry = lax.fori_loop(
                0,
                SUBLANES,
                lambda row, carry: token(g, last - row if reverse else row, carry),
                carry,
                unroll=compiled,
            )
            end(g)
            return carry

        return repeat(group, carry, groups, stretch=stretch, compiled=compiled)

    def _at(self, t: Any, reverse: bool) -> Any:
        return self.chunks - 1 - t if reverse else t


def cut(x: jax.Array, chunk: int, lanes: int) -> Blocks:
    """The blocks of x [B, T, D]: at most `chunk` tokens, a multiple of 16 (8 for fewer), and about
    `lanes` channels.

    Blocks of channels are equal: of the multiples of 128 that divide the padded width the largest
    within `lanes`."""
    batch, length, channels = x.shape
    width = LANES * pl.cdiv(channels, LANES)
    fitting = [n for n in range(LANES, max(lanes, LANES) + 1, LANES) if width % n == 0]
    few = SUBLANES if length <= SUBLANES else 2 * SUBLANES * pl.cdiv(length, 16)
    return Blocks(batch, length, width, min(chunk, few), max(fitting))


def repeat(
    body: Callable[[Any, Any], Any], carry: Any, count: int, *, stretch: int, compiled: bool
) -> Any:
    """carry = body(i, carry) for i below `count`; compiled, `stretch` of them in one piece of
    code."""
    unroll = stretch if compiled and count % stretch == 0 else 1
    return lax.fori_loop(0, count, body, carry, unroll=unroll)


def pad_channels(x: jax.Array) -> jax.Array:
    """[..., D] with zeros up to whole lanes."""
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def call(
    kernel: Callable[..., None],
    blocks: Blocks,
    inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Sequence[Any],
    *,
    interpret: bool,
) -> Any:
    """The outputs of `kernel`, run over the grid; it is told whether it is `compiled`, for
    `Blocks.loop`."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)

    return pl.pallas_call(
        functools.partial(kernel, compiled=not interpret),
        grid=blocks.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=scratch,
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*arrays)


def keep_scalars(
    segment_ids: jax.Array | None, blocks: Blocks, reverse: bool = False, *, past: int
) -> tuple[jax.Array, pl.BlockSpec]:
    """Scalars for a kernel, [B, chunks, 1, C]: 1, or 0 for tokens that start a segment; `past` for
    those past T."""
    keep = (
        jnp.ones((blocks.batch, blocks.length), jnp.int32)
        if segment_ids is None
        else segments.continues(segment_ids).astype(jnp.int32)
    )
    padding = ((0, 0), (0, blocks.chunks * blocks.chunk - blocks.length))
    keep = jnp.pad(keep, padding, constant_values=past)
    keep = keep.reshape(blocks.batch, blocks.chunks, 1, blocks.chunk)
    spec = blocks.shared(keep, reverse)
    return keep, pl.BlockSpec(spec.block_shape, spec.index_map, memory_space=pltpu.SMEM)
