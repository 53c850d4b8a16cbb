"""The grid of TPU kernels of elementwise recurrences: batch, chunks of tokens, blocks of channels.

**Layout.** Arrays stay as the caller has them, [B, T, D], D padded to whole lanes where it is none
(no published model has such a D). A grid step reads a tile of C tokens and L channels, channels
along lanes, tokens in rows. The blocks of a chunk follow each other, so that what all channels
share is prepared once per chunk and sums over channels need no memory outside the kernel. What must
outlive a chunk, the states and sums over time, stays in fast memory for a whole sequence, as an
output tile that is written back at its end.

**Rows.** Tokens are taken one after another. A row of 8 is loaded with its sublanes repeated or
spread, which is free; so a chunk is first cast to float32 and kept as groups of 8 tokens, [C / 8,
8, L], whose rows have static places in a group.

**Directions.** A grid walks through time in the direction of the recurrence, from the last token to
the first for an op with `reverse=True`; a backward kernel walks against it (`backward` in the
methods). No array is flipped: index maps count chunks from the other end, and loops count tokens
so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..framework import segments
from .kernel import LANES, SUBLANES, Input, Output, Ref


@dataclass(frozen=True)
class ChannelGrid:
    """The grid (batch, chunks, blocks of channels) over arrays [B, T, width].

    chunk: C tokens; lanes: L channels of a block.
    reverse: whether the recurrence runs from the last token to the first."""

    batch: int
    length: int
    width: int
    chunk: int
    lanes: int
    reverse: bool
    interpret: bool

    dimensions = ("parallel", "arbitrary", "arbitrary")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.chunks, self.width // self.lanes

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def groups(self) -> int:
        """Groups of 8 tokens in a chunk."""
        return self.chunk // SUBLANES

    @property
    def tiles(self) -> tuple[slice, ...]:
        """The block's channels, 128 at a time."""
        return tuple(slice(i, i + LANES) for i in range(0, self.lanes, LANES))

    # --- Tiles

    def of_tokens(self, x_BTD: jax.Array, backward: bool = False) -> Input:
        """A chunk of a block."""
        return Input(self.widened(x_BTD), self.tokens(backward))

    def token_output(
        self, x_BTD: jax.Array, backward: bool = False, *, dtype: Any = None
    ) -> Output:
        """[B, T, width] in x's dtype, unless another is given."""
        shape = *x_BTD.shape[:2], self.width
        return Output(jax.ShapeDtypeStruct(shape, dtype or x_BTD.dtype), self.tokens(backward))

    def of_sequences(self, x: jax.Array) -> Input:
        """All of one sequence of [B, rows, width]."""
        return Input(x, self.sequence(x.shape[1]))

    def sequence_output(self, rows: int) -> Output:
        """[B, rows, width] in float32: a state or a sum over time of each sequence. A kernel finds
        in its tile what it wrote there in the sequence's steps before."""
        shape = jax.ShapeDtypeStruct((self.batch, rows, self.width), jnp.float32)
        return Output(shape, self.sequence(rows))

    def constant(self, x: jax.Array) -> Input:
        """All of [rows, width], fetched once."""
        return Input(x, pl.BlockSpec(x.shape, lambda b, t, d: (0, 0)))

    def widened(self, x: jax.Array) -> jax.Array:
        """[..., D] with zeros up to the width."""
        missing = self.width - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

    def tokens(self, backward: bool = False) -> pl.BlockSpec:
        """A chunk of a block of [B, T, width]."""
        tile = 1, self.chunk, self.lanes
        return pl.BlockSpec(tile, lambda b, t, d: (b, self.chunk_index(t, backward), d))

    def shared(
        self, array: jax.Array | jax.ShapeDtypeStruct, backward: bool = False, memory: Any = None
    ) -> pl.BlockSpec:
        """A chunk of [B, chunks, ...], the same for all channels."""
        rest = array.shape[2:]
        return pl.BlockSpec(
            (1, 1, *rest),
            lambda b, t, d: (b, self.chunk_index(t, backward), *(0 for _ in rest)),
            memory_space=memory,
        )

    def chunk_states(self, rows: int, backward: bool = False, count: int = 1) -> pl.BlockSpec:
        """One chunk and block of [B, chunks, rows, width], or of `count` times the chunks."""
        tile = 1, count, rows, self.lanes
        return pl.BlockSpec(tile, lambda b, t, d: (b, self.chunk_index(t, backward), 0, d))

    def sequence(self, rows: int) -> pl.BlockSpec:
        """All of one sequence of [B, rows, width], in fast memory until its last step."""
        return pl.BlockSpec((1, rows, self.width), lambda b, t, d: (b, 0, 0))

    def keep(self, segment_ids: jax.Array | None, backward: bool = False, *, past: int) -> Input:
        """Scalars [1, 1, 1, C] of int32: whether the state before a token survives into it; `past`
        for those past T."""
        keep = (
            jnp.ones((self.batch, self.length), jnp.int32)
            if segment_ids is None
            else segments.continues(segment_ids, reverse=self.reverse).astype(jnp.int32)
        )
        padding = ((0, 0), (0, self.chunks * self.chunk - self.length))
        keep = jnp.pad(keep, padding, constant_values=past)
        keep = keep.reshape(self.batch, self.chunks, 1, self.chunk)
        return Input(keep, self.shared(keep, backward, memory=pltpu.SMEM))

    def group_scratch(self, beside: int = 0) -> Any:
        """Scratch for the groups of a chunk, and for `beside` groups beside it."""
        return pltpu.VMEM((self.groups + beside, SUBLANES, self.lanes), jnp.float32)

    # --- Inside a kernel

    def runs_back(self, backward: bool) -> bool:
        """Whether a kernel walks from the last token to the first."""
        return backward != self.reverse

    def chunk_index(self, t: Any, backward: bool = False) -> Any:
        """Which chunk step t along time takes."""
        return self.chunks - 1 - t if self.runs_back(backward) else t

    def places(self, block: Any) -> tuple[Any, list[Any]]:
        """Where a block, and where each of its tiles, lies among all channels."""
        starts = [block * self.lanes + tile.start for tile in self.tiles]
        tiles = [pl.ds(pl.multiple_of(start, LANES), LANES) for start in starts]
        return pl.ds(pl.multiple_of(starts[0], LANES), self.lanes), tiles

    def read(self, ref: Ref, chunk_index: Any) -> jax.Array:
        """A chunk [C, L] in float32; zeros where no token is."""
        return self.masked(ref[0].astype(jnp.float32), chunk_index)

    def masked(self, x: jax.Array, chunk_index: Any) -> jax.Array:
        """x [C, L], zero where no token is."""
        if self.length % self.chunk == 0:
            return x
        rows = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(chunk_index * self.chunk + rows < self.length, x, 0.0)

    def grouped(self, x: jax.Array) -> jax.Array:
        """[C, L] -> [C / 8, 8, L]."""
        return x.reshape(self.groups, SUBLANES, self.lanes)

    def loop(
        self,
        token: Callable[[Any, Any, Any], Any],
        carry: Any,
        *,
        end: Callable[[Any], None] = lambda group: None,
        backward: bool = False,
        stretch: int = 1,
        part: tuple[Any, int] | None = None,
    ) -> Any:
        """carry = token(group, row, carry) for the chunk's tokens in the kernel's direction, and
        end(group) after each 8.

        stretch: groups that are one piece of code, to fill each other's waiting times.
        part: first group and number of groups, None for all."""
        first, groups = part or (0, self.groups)
        last = SUBLANES - 1
        back = self.runs_back(backward)

        def group(step, carry):
            g = first + (groups - 1 - step if back else step)
            carry = lax.fori_loop(
                0,
                SUBLANES,
                lambda row, carry: token(g, last - row if back else row, carry),
                carry,
                # Compiled, rows are constants; interpreted, loops stay loops, because a CPU's
                # compiler takes long over such pieces.
                unroll=not self.interpret,
            )
            end(g)
            return carry

        return self.repeat(group, carry, groups, stretch)

    def repeat(self, body: Callable[[Any, Any], Any], carry: Any, count: int, stretch: int) -> Any:
        """carry = body(i, carry) for i below `count`, `stretch` of them in one piece of code."""
        unroll = stretch if not self.interpret and count % stretch == 0 else 1
        return lax.fori_loop(0, count, body, carry, unroll=unroll)


def cut(
    x: jax.Array, chunk: int, lanes: int, *, reverse: bool = False, interpret: bool = False
) -> ChannelGrid:
    """The grid over x [B, T, D]: at most `chunk` tokens in a step, a multiple of 16 (8 for fewer),
    and about `lanes` channels.

    Blocks of channels are equal: of the multiples of 128 that divide the padded width the largest
    within `lanes`."""
    batch, length, channels = x.shape
    width = LANES * pl.cdiv(channels, LANES)
    fitting = [n for n in range(LANES, max(lanes, LANES) + 1, LANES) if width % n == 0]
    few = SUBLANES if length <= SUBLANES else 2 * SUBLANES * pl.cdiv(length, 16)
    return ChannelGrid(batch, length, width, min(chunk, few), max(fitting), reverse, interpret)
