"""Flow attention by sums over tokens, each of which is linear attention to all tokens: of one
column for a flow, (x + eps) (sum_j y_j + eps) = sum_j (x + eps) y_j + eps (x + eps) 1, and of V
columns at the end. Segments and meshes are those of that op.

Only the inputs are kept for the backward pass, which computes the flows again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..bidirectional_linear_attention.api import bidirectional_linear_attention
from ..framework import segments
from .reference import FEATURE_MAPS


def over(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, zero where y is."""
    return jnp.where(y != 0, x / jnp.where(y != 0, y, 1.0), 0.0)


def features(x: jax.Array, mask: jax.Array | None, feature_map: str) -> jax.Array:
    """phi(x) in float32, zero for tokens that are not there."""
    phi = FEATURE_MAPS[feature_map]
    # Masked before too: the derivative of phi at what stands there may be no number.
    return present(phi(present(x.astype(jnp.float32), mask)), mask)


def present(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, T, ...], zero where mask [B, T] is false."""
    if mask is None:
        return x
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def flow_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_mask: jax.Array | None,
    key_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    **options: Any,
) -> jax.Array:
    """o [B, T, H, V] in float32; shapes and options as in `api.py`."""
    core = jax.checkpoint(functools.partial(_attend, **options))
    return core(q, k, v, query_mask, key_mask, segment_ids)


def _attend(
    q, k, v, query_mask, key_mask, segment_ids, *, feature_map, competition, allocation, clip, eps
):
    q, k = features(q, query_mask, feature_map), features(k, key_mask, feature_map)
    v = present(v.astype(jnp.float32), key_mask)
    attend = functools.partial(
        bidirectional_linear_attention, normalise=False, segment_ids=segment_ids
    )

    def sums(like: jax.Array, y: jax.Array) -> jax.Array:
        """sum_j y_j [B, like, H, Y] of y [B, S, H, Y], as many rows as `like` has."""
        return attend(jnp.ones((*like.shape[:3], 1)), jnp.ones((*y.shape[:3], 1)), y)

    def flow(x: jax.Array, y: jax.Array) -> jax.Array:
        """(x_i + eps) (sum_j y_j + eps) [B, T, H, 1]."""
        x = x + eps
        return attend(x, y, jnp.ones((*y.shape[:3], 1))) + eps * x.sum(-1, keepdims=True)

    incoming, outgoing = flow(q, k), flow(k, q)
    if competition:
        conserved = flow(k, over(q, incoming))
        highest = clip
        if clip is None:
            highest = _highest(conserved, key_mask, segment_ids)
        else:
            conserved = jnp.clip(conserved, -clip, clip)
        share = present(jnp.exp(conserved - highest), key_mask)
        there = present(jnp.ones_like(share), key_mask)
        total, count = jnp.split(sums(k, jnp.concatenate([share, there], axis=-1)), 2, axis=-1)
        v = v * over(count * share, total)
    o = attend(over(q, incoming), k, v)
    if allocation:
        sinks, sources = (
            sums(q[:, :, :1], present(jnp.ones((*x.shape[:2], 1, 1)), mask))
            for x, mask in ((q, query_mask), (k, key_mask))
        )
        conserved = flow(q, over(k, outgoing))
        o = o * jax.nn.sigmoid(conserved * over(sinks, sources))
    return o


def _highest(
    x_BSH1: jax.Array, key_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """The largest x of the segment, a constant: [B, S, H, 1], or [B, 1, H, 1] of one segment."""
    x_BSH1 = jax.lax.stop_gradient(x_BSH1)
    if key_mask is not None:
        x_BSH1 = jnp.where(key_mask[..., None, None], x_BSH1, -jnp.inf)
    if segment_ids is None:
        return _finite(x_BSH1.max(axis=1, keepdims=True))
    number = segments.numbers(segment_ids)
    largest = functools.partial(jax.ops.segment_max, num_segments=number.shape[1])
    return _finite(jax.vmap(lambda x, number: largest(x, number)[number])(x_BSH1, number))


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)
