"""Kronecker attention in plain JAX on every backend, without T^3 numbers at once.

For one j the scores are those of ordinary attention with the query q_i * k1_j,

    o_i = sum_j v1_j * (sum_k exp(scale (q_i * k1_j) k2_k) v2_k) / sum_jk exp(..)

so a block of queries walks over blocks of j, each of which meets all k in matrix products, and
keeps the largest score, the numerator and the denominator so far, as softmax in parts does. The
backward pass computes each block again.

Letters: B batch, H heads, I queries of a block, J first keys of a block, T time, L key, V value."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments

QUERIES, KEYS = 32, 8


def forward(q, k1, k2, v1, v2, segment_ids, *, scale, causal) -> tuple[jax.Array]:
    """o [B, T, H, V] in float32; shapes as in `api.py`."""
    q, k1, k2, v1, v2 = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2))
    batch, length = q.shape[:2]
    number = segments.numbers(segment_ids)
    number = jnp.zeros((batch, length), jnp.int32) if number is None else number
    place = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))

    @jax.checkpoint
    def of_queries(block: Any) -> jax.Array:
        q, number_q, place_q = block

        def sees(number_k: jax.Array, place_k: jax.Array) -> jax.Array:
            same = number_q[:, :, None] == number_k[:, None, :]
            return same & (place_q[:, :, None] >= place_k[:, None, :]) if causal else same

        sees_second = sees(number, place)[:, None, :, None, :]

        @jax.checkpoint
        def step(carry: Any, keys: Any) -> tuple[Any, None]:
            largest, total, o = carry  # [B, H, I], likewise, and [B, H, I, V]
            k1, v1, number_k, place_k = keys
            # Keys that fill up the last block stand after every query, in no segment.
            pairs = sees(number_k, place_k)[:, None, :, :, None] & sees_second
            queries = scale * q[:, :, None] * k1[:, None]
            scores = einsum("bijhl,bthl->bhijt", queries, k2)
            highest = jnp.max(jnp.where(pairs, scores, -jnp.inf), axis=(3, 4))
            new = lax.stop_gradient(jnp.maximum(largest, highest))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            below = jnp.where(pairs, scores - shift[..., None, None], 0.0)
            weights = jnp.where(pairs, jnp.exp(below), 0.0)
            kept = jnp.exp(largest - shift)
            of_pairs = einsum("bhijt,bthv->bhijv", weights, v2)
            o = kept[..., None] * o + einsum("bhijv,bjhv->bhiv", of_pairs, v1)
            return (new, kept * total + weights.sum((3, 4)), o), None

        shape = (batch, q.shape[2], q.shape[1])
        empty = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v1.shape[-1]))
        keys = tuple(
            _blocks(x, KEYS, fill) for x, fill in ((k1, 0), (v1, 0), (number, -1), (place, length))
        )
        (_, total, o), _ = lax.scan(step, empty, keys)
        # Queries that fill up the last block see nothing.
        return jnp.swapaxes(o / jnp.where(total == 0, 1.0, total)[..., None], 1, 2)

    tokens = ((q, 0), (number, -2), (place, length))
    queries = tuple(_blocks(x, QUERIES, fill) for x, fill in tokens)
    o = jnp.moveaxis(lax.map(of_queries, queries), 0, 1)
    return (o.reshape(batch, -1, *o.shape[3:])[:, :length],)


def backward(q, k1, k2, v1, v2, segment_ids, do, **static) -> tuple[jax.Array, ...]:
    """Gradients of q, k1, k2, v1 and v2, float32."""
    inputs = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2))
    call = functools.partial(forward, segment_ids=segment_ids, **static)
    _, pullback = jax.vjp(call, *inputs)
    return pullback((do.astype(jnp.float32),))


def _blocks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[N, B, size, ...] of x [B, T, ...]."""
    count = -(-x.shape[1] // size)
    padding = [(0, 0), (0, count * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)
