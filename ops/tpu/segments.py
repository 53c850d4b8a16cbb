"""The grid of TPU kernels where every segment has a state of its own (`num_segments`).

Nothing is sorted or padded in memory: a step takes what one segment has in one chunk, so that a
chunk in which segments meet is taken once for each of them. A step masks the rows of the others in
what it reads and leaves them as they are in what it writes. With G chunks and S segments that is at
most

    G' = G + S - 1

steps, if a segment without tokens takes a step too, which hands its state on; the steps that are
left over come after all others and have no rows. Which chunk, segment and rows a step has is known
when the program runs (`SegmentSteps`): it is prefetched as scalars, by which index maps find the
tiles, those of states included. The carry is loaded where the segment changes and stored where it
ends. Between these, a kernel works as with one state: rows that are not its own are tokens that
neither write nor decay.

Steps of the same segment follow each other, and so do those of the same chunk, in both directions:
a tile is written back once."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .heads import HeadGrid, Step, chunk_rows, from_chunk_rows, write
from .kernel import Prefetched, Ref


class SegmentSteps(NamedTuple):
    """What each step takes, in the order of tokens; int32.

    chunk, start, stop: [B, G'], the chunk and its first row and the one after its last; none are
      left where start >= stop.
    segment: [B, G' + 2], the segment; -1 before the first step and after the last."""

    chunk: Any
    start: Any
    stop: Any
    segment: Any


def segment_steps(
    segment_ids: jax.Array, num_segments: int, chunk: int, chunks: int
) -> SegmentSteps:
    """The steps of `segment_ids` [B, T] in 0..S-1, non-decreasing along time; segments may be
    empty."""
    # Few operations, and no gathers: the arrays are so small that each costs as much as a chunk.
    number_S = jnp.arange(num_segments)[None, None]
    ids_BT1 = segment_ids[:, :, None]
    start_BS = (ids_BT1 < number_S).sum(1, dtype=jnp.int32)
    end_BS = (ids_BT1 <= number_S).sum(1, dtype=jnp.int32)
    first_BS = jnp.minimum(start_BS // chunk, chunks - 1)
    steps_BS = jnp.maximum(-(-end_BS // chunk) - first_BS, 1)
    earlier_SS = np.tri(num_segments, k=-1, dtype=bool)
    step_BS = jnp.where(earlier_SS[None], steps_BS[:, None], 0).sum(-1, dtype=jnp.int32)

    def segment_of(number_G: jax.Array) -> jax.Array:
        begun_BGS = step_BS[:, None] <= number_G[None, :, None]
        return begun_BGS.sum(-1, dtype=jnp.int32) - 1

    steps = chunks + num_segments - 1
    number_G = jnp.arange(steps, dtype=jnp.int32)
    is_of_BGS = segment_of(number_G)[:, :, None] == number_S

    def of(x_BS: jax.Array) -> jax.Array:
        return jnp.where(is_of_BGS, x_BS[:, None], 0).sum(-1)

    chunk_BG = of(first_BS) + number_G[None] - of(step_BS)
    # A step that is left over stands behind the last chunk, where no rows are.
    start_BG, end_BG = (of(x) - chunk_BG * chunk for x in (start_BS, end_BS))
    around_G = jnp.arange(-1, steps + 1, dtype=jnp.int32)
    inside_1G = ((around_G >= 0) & (around_G < steps))[None]
    return SegmentSteps(
        chunk=jnp.minimum(chunk_BG, chunks - 1),
        start=jnp.clip(start_BG, 0, chunk),
        stop=jnp.clip(end_BG, 0, chunk),
        segment=jnp.where(inside_1G, segment_of(around_G), -1),
    )


def by_segments(
    grid: HeadGrid, segment_ids: jax.Array | None, num_segments: int | None
) -> tuple[HeadGrid, jax.Array | None]:
    """The grid of a call, and the segment ids whose boundaries lie inside steps: those that were
    given if there is one state per sequence, and none if there is one per segment."""
    if num_segments is None:
        return grid, segment_ids
    assert segment_ids is not None
    made = segment_steps(segment_ids, num_segments, grid.chunk, grid.chunks)
    of_grid = {field.name: getattr(grid, field.name) for field in fields(grid)}
    return SegmentGrid(**of_grid, num_segments=num_segments, made=made), None


@dataclass(frozen=True, eq=False)
class SegmentGrid(HeadGrid):
    """num_segments: S. States are [B S, H, K, V], and every row of numbers is of one step."""

    num_segments: int
    made: SegmentSteps

    @property
    def plan(self) -> SegmentSteps:
        # Flat: scalar memory pads the rows of an array.
        return SegmentSteps(*(Prefetched(x.reshape(-1)) for x in self.made))

    @property
    def steps(self) -> int:
        return self.chunks + self.num_segments - 1

    @property
    def states_per_row(self) -> int:
        return self.num_segments

    def rows(self, x_BHT: jax.Array) -> jax.Array:
        x = chunk_rows(jnp.broadcast_to(x_BHT, (self.batch, *x_BHT.shape[1:])), self)
        x = jnp.take_along_axis(x, self.made.chunk[:, None, :, None, None], axis=2)
        return jnp.where(self._taken(), x, 0.0)

    def from_rows(self, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(jnp.where(self._taken(), x, 0.0), 2, 1)  # [B, G', n, heads, C]

        def of_chunks(chunk_G: jax.Array, x: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(x, chunk_G, self.chunks, indices_are_sorted=True)

        x = jax.vmap(of_chunks)(self.made.chunk, x)
        return from_chunk_rows(jnp.moveaxis(x, 1, 2), self.length)

    def step(self, plan: Any, backward: bool = False) -> Step:
        return SegmentStep(self, pl.program_id(2), backward, pl.program_id(0), plan)

    def _taken(self) -> jax.Array:
        """[B, 1, G', 1, C], which rows of numbers a step takes."""
        row_C = jnp.arange(self.chunk)[None, None]
        start_BG1, stop_BG1 = self.made.start[..., None], self.made.stop[..., None]
        return ((start_BG1 <= row_C) & (row_C < stop_BG1))[:, None, :, None]

    def _chunk(self, b: Any, t: Any, backward: bool, *plan: Ref) -> Any:
        return SegmentSteps(*plan).chunk[b * self.steps + self.step_index(t, backward)]

    def _state(self, b: Any, t: Any, backward: bool, *plan: Ref) -> Any:
        segment = SegmentSteps(*plan).segment
        at = b * (self.steps + 2) + self.step_index(t, backward) + 1
        return b * self.num_segments + segment[at]


@dataclass(frozen=True)
class SegmentStep(Step):
    """What one segment has in one chunk."""

    b: Any
    plan: SegmentSteps  # references

    @property
    def first(self) -> Any:
        return self._differs(-1)

    @property
    def last(self) -> Any:
        return self._differs(1)

    def valid(self) -> jax.Array:
        row = lax.broadcasted_iota(jnp.int32, (self.grid.chunk, 1), 0)
        at = self.b * self.grid.steps + self.grid.step_index(self.t, self.backward)
        return (row >= self.plan.start[at]) & (row < self.plan.stop[at])

    def write(self, ref: Ref, head: int, x: jax.Array) -> None:
        # The other rows are another segment's, already written or to be written yet.
        size = x.shape[1]
        others = ref[0, :, head * size : (head + 1) * size].astype(x.dtype)
        write(ref, head, jnp.where(self.valid(), x, others))

    def _differs(self, steps: int) -> Any:
        """Whether another segment is so many steps further along the walk."""
        along = -steps if self.backward != self.grid.reverse else steps
        at = self.b * (self.grid.steps + 2) + 1 + self.grid.step_index(self.t, self.backward)
        return self.plan.segment[at] != self.plan.segment[at + along]
