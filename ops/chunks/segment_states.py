"""How time is cut into chunks where every segment has a state of its own (`num_segments`).

Each segment starts a chunk, so that a chunk has no boundary inside and what the chunked forms
compute there stays as it is. The scan over chunks reads and writes the state of the chunk's
segment. Letters as in `chunking.py`; S is the number of segments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class SegmentChunks(NamedTuple):
    """A cut of T tokens into G chunks of C rows, each with tokens of one segment only.

    token: [B, G C], the token in each row, T in rows that fill up a chunk.
    row: [B, T], the row of each token.
    segment: [G, B], the segment of each chunk; a chunk without tokens has any, and changes no
      state."""

    token: jax.Array
    row: jax.Array
    segment: jax.Array


def segment_chunks(segment_ids: jax.Array, num_segments: int, chunk: int) -> SegmentChunks:
    """The cut for `segment_ids` [B, T] in 0..S-1, non-decreasing along time; segments may be empty.

    G is static: segments of n_s tokens fill sum_s ceil(n_s / C) <= (T + S (C - 1)) / C chunks,
    whatever the n_s are."""
    length = segment_ids.shape[1]
    chunks = min(length, (length + num_segments * (chunk - 1)) // chunk)
    number_S, number_G = jnp.arange(num_segments), jnp.arange(chunks)
    count_BS = (segment_ids[:, :, None] == number_S[None, None, :]).sum(1)
    chunks_BS = -(-count_BS // chunk)
    end_BS, chunk_end_BS = jnp.cumsum(count_BS, axis=1), jnp.cumsum(chunks_BS, axis=1)
    start_BS, chunk_start_BS = end_BS - count_BS, chunk_end_BS - chunks_BS

    def of(per_segment_BS: jax.Array, segment_BX: jax.Array) -> jax.Array:
        return jnp.take_along_axis(per_segment_BS, segment_BX, axis=1)

    ended_BGS = chunk_end_BS[:, None, :] <= number_G[None, :, None]
    segment_BG = jnp.minimum(ended_BGS.sum(-1), num_segments - 1)
    before_BG = number_G[None, :] - of(chunk_start_BS, segment_BG)
    token_BG1 = (of(start_BS, segment_BG) + chunk * before_BG)[:, :, None]
    token_BGC = token_BG1 + jnp.arange(chunk)[None, None, :]
    inside_BGC = token_BGC < of(end_BS, segment_BG)[:, :, None]
    token_BGC = jnp.where(inside_BGC, token_BGC, length)
    shift_BS = chunk * chunk_start_BS - start_BS
    row_BT = jnp.arange(length)[None, :] + of(shift_BS, segment_ids)
    return SegmentChunks(token_BGC.reshape(token_BGC.shape[0], -1), row_BT, segment_BG.T)


def chunk_owners(segments: SegmentChunks | None) -> jax.Array | None:
    """The segment of each chunk [G, B]; None where the sequence has one state."""
    return None if segments is None else segments.segment


def scan_segments(
    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    states: jax.Array,
    inputs: Any,
    segment: jax.Array | None = None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, Any]:
    """The final state and the results of `lax.scan`, of step(state [B, ...], chunk) -> (state,
    result).

    segment: [G, B], whose state each of the G steps reads and writes; `states` and the final ones
    are then [B, S, ...]."""
    if segment is None:
        return lax.scan(step, states, inputs, reverse=reverse)
    every = jnp.arange(states.shape[0])

    def of_its_segment(states: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        segment_B, one = inputs
        state, result = step(states[every, segment_B], one)
        return states.at[every, segment_B].set(state), result

    return lax.scan(of_its_segment, states, (segment, inputs), reverse=reverse)
