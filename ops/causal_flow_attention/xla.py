"""Causal flow attention by sums over the past, each of which is linear attention without decay: of
one column for a flow, and of V columns at the end. Segments, meshes that cut time and walks in
reverse are those of that op; flows that can be are computed together, as heads side by side.

Only the inputs are kept for the backward pass, which computes the flows again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..framework import segments
from ..gated_linear_attention.api import gated_linear_attention
from .reference import FEATURE_MAPS


def causal_flow_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, state: Any, segment_ids: Any, **options: Any
) -> tuple[jax.Array, Any]:
    """o [B, T, H, V] in float32 and the parts of the final state; shapes and options as in
    `api.py`."""
    core = jax.checkpoint(functools.partial(_attend, **options))
    return core(q, k, v, state, segment_ids)


def _attend(
    q,
    k,
    v,
    state,
    segment_ids,
    *,
    feature_map,
    competition,
    allocation,
    clip,
    eps,
    reverse,
    implementation,
):
    phi = FEATURE_MAPS[feature_map]
    q, k, v = phi(q.astype(jnp.float32)), phi(k.astype(jnp.float32)), v.astype(jnp.float32)
    first_count, keys, queries, keys_out, queries_in, shares, memory = state
    past = {"scale": 1.0, "segment_ids": segment_ids, "reverse": reverse}

    def two_flows(x: Any, y: Any, before: Any) -> tuple[Any, Any]:
        """(x + eps) (sum y + eps) [B, T, H, 1] of two pairs, and the last sums [B, H, K]."""
        x, y, before = (_side_by_side(*pair) for pair in (x, y, before))
        x = x + eps
        o, last = gated_linear_attention(
            *(x, y, jnp.ones((*y.shape[:3], 1))),
            initial_state=before[..., None],
            implementation="xla",
            **past,
        )
        return _apart(o + eps * x.sum(-1, keepdims=True)), _apart(last[..., 0])

    count, last_count = _counts(first_count, segment_ids, q.shape[:2], reverse)
    n = count.astype(jnp.float32)[..., None, None]
    (incoming, outgoing), (keys, queries) = two_flows((q, k), (k, q), (keys, queries))
    (conserved_in, conserved_out), (keys_out, queries_in) = two_flows(
        (q, k), (k * (n / outgoing), q * (n / incoming)), (keys_out, queries_in)
    )
    share = jnp.exp(jnp.clip(conserved_out / n, -clip, clip) - clip)
    one = jnp.ones_like(share)
    total, shares = gated_linear_attention(
        one, one, share, initial_state=shares[..., None, None], implementation="xla", **past
    )
    if competition:
        v = v * (n * share / total)
    o, memory = gated_linear_attention(
        q / incoming, k, v, initial_state=memory, implementation=implementation, **past
    )
    if allocation:
        o = o * jax.nn.sigmoid(conserved_in / n)
    return o, (last_count, keys, queries, keys_out, queries_in, shares[..., 0, 0], memory)


def _side_by_side(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., 2 H, K] of two [..., H, K], those of one head beside each other: a mesh that cuts heads
    cuts both alike."""
    pair = jnp.stack([x, y], axis=-2)
    return pair.reshape(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])


def _apart(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_side_by_side`."""
    pair = pair.reshape(*pair.shape[:-2], pair.shape[-2] // 2, 2, pair.shape[-1])
    return pair[..., 0, :], pair[..., 1, :]


def _counts(
    first: jax.Array, segment_ids: Any, shape: tuple[int, ...], reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """How many tokens of its segment have come with each token [B, T], and in all with the last
    token of the walk [B]."""
    step = jnp.broadcast_to(jnp.arange(1, shape[1] + 1)[None], shape)
    count = step + first[:, None]
    if segment_ids is not None:
        starts = segments.starts(segment_ids, reverse=reverse)
        starts = starts[:, ::-1] if reverse else starts
        before = jax.lax.cummax(jnp.where(starts, step - 1, -1), axis=1)
        count = jnp.where(before >= 0, step - before, count)
    return (count[:, ::-1] if reverse else count), count[:, -1]
