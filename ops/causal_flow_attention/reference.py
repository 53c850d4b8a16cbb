"""Causal flow attention as a scan over tokens in float32: the definition that every other
implementation is held to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

FEATURE_MAPS = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jax.nn.relu(x) + 1e-6,
    "identity": lambda x: x,
}


def causal_flow_attention(
    q, k, v, state, segment_ids, *, feature_map, competition, allocation, clip, eps, reverse
):
    """o [B, T, H, V] in float32 and the parts of the final state; shapes as in `api.py`."""
    phi = FEATURE_MAPS[feature_map]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    starts_BT = jnp.zeros(q.shape[:2], bool)
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        first = (0, 1) if reverse else (1, 0)
        starts_BT = jnp.pad(changes, ((0, 0), first))

    def step(state, token):
        q, k, v, starts = token

        def kept(x):
            return jnp.where(starts.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)

        count, keys, queries, keys_out, queries_in, shares, memory = map(kept, state)
        count = count + 1
        n = count.astype(jnp.float32)[:, None]

        def flow(x, total):
            return jnp.sum((x + eps) * (total + eps), axis=-1)

        keys, queries = keys + k, queries + q
        incoming, outgoing = flow(q, keys), flow(k, queries)
        keys_out = keys_out + k * (n / outgoing)[..., None]
        queries_in = queries_in + q * (n / incoming)[..., None]
        conserved_in, conserved_out = flow(q, keys_out) / n, flow(k, queries_in) / n
        share = jnp.exp(jnp.clip(conserved_out, -clip, clip) - clip)
        shares = shares + share
        if competition:
            v = v * (n * share / shares)[..., None]
        memory = memory + einsum("bhk,bhv->bhkv", k, v)
        o = einsum("bhk,bhkv->bhv", q / incoming[..., None], memory)
        if allocation:
            o = o * jax.nn.sigmoid(conserved_in)[..., None]
        return (count, keys, queries, keys_out, queries_in, shares, memory), o

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (phi(q), phi(k), v, starts_BT))
    state, o = lax.scan(step, state, tokens, reverse=reverse)
    return jnp.moveaxis(o, 0, 1), state
