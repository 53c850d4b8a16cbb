"""Where the backward kernels of matrix-state ops put the gradients of q, k, log decays and one
number per token."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .blocks import Blocks, from_chunk_rows

Output = tuple[jax.ShapeDtypeStruct, Any]


def of_key_head(x: jax.Array, blocks: Blocks) -> Output:
    """Of q or k [B, T, HK, K]: where several steps share a key head, each writes its own part of
    the sum, in float32."""
    batch, length, heads, key = x.shape
    parts = blocks.steps_per_key_head
    shape = (batch, length, heads * parts * key)
    dtype = x.dtype if parts == 1 else jnp.float32
    return jax.ShapeDtypeStruct(shape, dtype), blocks.key_parts(reverse=True)


def sum_of_parts(dx: jax.Array, x: jax.Array, blocks: Blocks) -> jax.Array:
    """Inverse of the layout of `of_key_head`."""
    parts = blocks.steps_per_key_head
    if parts == 1:
        return dx.reshape(x.shape)
    batch, length, heads, key = x.shape
    return dx.reshape(batch, length, heads, parts, key).sum(3)


def of_tokens(blocks: Blocks) -> Output:
    """One float32 per token and head, as rows [heads, C] of a chunk."""
    steps = blocks.all_heads // blocks.heads
    shape = jax.ShapeDtypeStruct(
        (blocks.batch, steps, blocks.chunks, blocks.heads, blocks.chunk), jnp.float32
    )
    return shape, blocks.rows(shape, reverse=True)


def of_decay(decay_log: jax.Array | None, blocks: Blocks) -> list[Output]:
    """One output for a decay that is an input, otherwise none."""
    if decay_log is None:
        return []
    if decay_log.ndim < 4:
        return [of_tokens(blocks)]
    shape = (blocks.batch, blocks.length, blocks.all_heads * blocks.key)
    return [(jax.ShapeDtypeStruct(shape, decay_log.dtype), blocks.tokens(blocks.key, reverse=True))]


def store_decay(refs: Sequence[Any], head: int, log: jax.Array | None) -> None:
    """Writes the gradient [C, K] or [1, C] of one head to the output of `of_decay`."""
    for ref in refs:
        assert log is not None
        if log.shape[0] == 1:
            ref[0, 0, 0, head : head + 1] = log
        else:
            size = log.shape[1]
            ref[0, :, head * size : (head + 1) * size] = log.astype(ref.dtype)


def decay_cotangent(
    dlog: Sequence[jax.Array], decay_log: jax.Array | None, length: int
) -> jax.Array | None:
    """In the shape of `decay_log`."""
    if decay_log is None:
        return None
    (dlog_,) = dlog
    if decay_log.ndim == 4:
        return dlog_.reshape(decay_log.shape)
    dlog_BHT = from_chunk_rows(dlog_, length)
    return dlog_BHT.sum((0, 2)) if decay_log.ndim == 1 else dlog_BHT.swapaxes(1, 2)
