"""What the last backward kernel of an op with a matrix state writes, and what becomes of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..framework.segments import numbers as segment_numbers
from . import tiles as gpu
from .channel_decay import ChannelDecay, KeyInputs, channel_scores_adjoint
from .chunks import Chunk, ChunkInputs, Sizes, key_gradient_dtypes


class ChunkGradients(NamedTuple):
    """Gradients as the kernel writes them, for each value head. None: not written."""

    dv: Any  # [B, T, H, V]
    dbeta: Any = None  # [B, T, H]
    dq: Any = None  # [B, T, H, K]
    dk: Any = None  # [B, T, H, K]
    dlog: Any = None  # [B, T, H], or [B, H, G] of a constant decay
    # With a decay for each channel, in the place of dq, dk and dlog.
    channels: ChannelDecay | None = None


def gradient_shapes(
    sizes: Sizes,
    inputs: ChunkInputs,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None,
    beta: jax.Array | None = None,
    key_scores: bool = False,
) -> ChunkGradients:
    """The shapes and dtypes of the outputs; key_scores: whether the op has scores of keys with
    keys."""
    dv = sizes.tokens_shape(v)
    dbeta = None if beta is None else sizes.tokens_shape(beta)
    if inputs.scores is not None:
        scores = sizes.rows_shape(sizes.chunk, sizes.dtype)
        keys = sizes.rows_shape(sizes.key, sizes.dtype)
        channels = ChannelDecay(
            scores,
            q_start=keys,
            k_end=keys,
            total=sizes.chunks_shape(sizes.key, dtype=jnp.float32),
            key_scores=scores if key_scores else None,
            k_start=keys if key_scores else None,
        )
        return ChunkGradients(dv, dbeta, channels=channels)
    shape = sizes.batch, sizes.length, sizes.heads, sizes.key
    dq, dk = (jax.ShapeDtypeStruct(shape, x) for x in key_gradient_dtypes(q, k, sizes))
    if decay_log is None:
        dlog = None
    elif decay_log.ndim == 1:
        dlog = sizes.chunks_shape(dtype=jnp.float32)
    else:
        dlog = sizes.tokens_shape(decay_log)
    return ChunkGradients(dv, dbeta, dq, dk, dlog)


def store_log_gradient(chunk: Chunk, ref: Any, gradient: jax.Array) -> None:
    """Writes the gradient of a chunk's logs [C] to `ChunkGradients.dlog`, of a constant decay its
    sum."""
    tokens = chunk.sizes.tokens(chunk.t)
    if len(chunk.refs.log.shape) == 3:
        gpu.store(ref, gradient, chunk.b, tokens, chunk.h)
        return
    # Tokens past the end have no decay: their rows do not count.
    C = chunk.sizes.chunk
    valid = chunk.t * C + lax.iota(jnp.int32, C) < chunk.sizes.length
    gpu.store(ref, jnp.where(valid, gradient, 0.0).sum(0), chunk.b, chunk.h, chunk.t)


def input_gradients(
    sizes: Sizes,
    gradients: ChunkGradients,
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """dq and dk [B, T, HK, K], and dlog like decay_log."""
    dq, dk, dlog = gradients.dq, gradients.dk, gradients.dlog
    if gradients.channels is not None:
        inputs = KeyInputs(q, k, decay_log, segment_numbers(segment_ids))
        with_scale = dataclasses.replace(sizes, scale=scale)
        dq, dk, dlog = channel_scores_adjoint(with_scale, inputs, gradients.channels)
    if q.shape[2] != sizes.heads:  # several value heads share a head of q and k
        dq, dk = (x.reshape(*q.shape[:3], -1, sizes.key).sum(3) for x in (dq, dk))
    if decay_log is not None and decay_log.ndim == 1:
        dlog = dlog.sum((0, 2))
    return dq, dk, dlog
