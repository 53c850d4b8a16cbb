"""Polynomial Kronecker attention in chunks of time, in plain JAX on every backend.

A chunk of C tokens is given the two sums over what its first token's segment has before it, and,
without a causal order, those over what its last token's segment has behind it. To them come the
sums over the tokens of the chunk itself that a token sees, [C, 2, R, V + 1] for each head: no more
than that is ever held, and the states at the starts of chunks. Features are formed in the chunk.

The backward pass computes each chunk again.

Letters: B batch, G chunks, C tokens of a chunk, H heads, S the two sums, R features, W = V + 1."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments
from .reference import monomials, weights

CHUNK = 16


def features(x: jax.Array, degree: int) -> jax.Array:
    """prod_l x_l^a_l [..., R] of x [..., K], each from the monomial without its last factor."""
    found = monomials(x.shape[-1], degree)
    index = {places: i for i, places in enumerate(found)}
    parts, start = [jnp.ones_like(x[..., :1])], 0
    for power in range(1, degree + 1):
        places = [a for a in found if len(a) == power]
        parents = np.array([index[a[:-1]] - start for a in places])
        start = index[places[0]]
        parts.append(parts[-1][..., parents] * x[..., np.array([a[-1] for a in places])])
    return jnp.concatenate(parts, axis=-1)


def forward(
    q, k1, k2, v1, v2, state, segment_ids, *, degree, scale, causal
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, V] and the final state in float32; shapes as in `api.py`."""
    batch, length = q.shape[:2]
    keys, values = jnp.stack([k1, k2], axis=3), jnp.stack([v1, v2], axis=3)
    # A token that fills up the last chunk has zeros for (v, 1): it writes nothing.
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
    number = segments.numbers(segment_ids)
    number = jnp.zeros((batch, length), jnp.int32) if number is None else number
    chunks = tuple(_chunks(x) for x in (q, keys, values))
    chunks = (*chunks, _chunks(number, mode="edge"))
    weight_R = weights(q.shape[-1], degree, scale)

    def written(keys: jax.Array, values: jax.Array) -> jax.Array:
        x = features(keys.astype(jnp.float32), degree)
        return einsum("bchsr,bchsw->bchsrw", x, values.astype(jnp.float32))

    def left(before: Any, writes: jax.Array, number: jax.Array, end: int) -> Any:
        """The sums over the segment at the end of the chunk, and its number."""
        state, of = before
        last = number[:, end]
        own = _only(number == last[:, None], writes).sum(1)
        return own + _only(last == of, state), last

    def behind(carry: Any, chunk: Any) -> tuple[Any, Any]:
        _, keys, values, number = chunk
        return left(carry, written(keys, values), number, 0), carry

    def read(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        (q, keys, values, number), after = chunk
        writes = written(keys, values)
        sees = number[:, :, None] == number[:, None, :]
        sees = jnp.tril(sees) if causal else sees
        sums = einsum("bij,bjhsrw->bihsrw", sees.astype(jnp.float32), writes)
        for state, of in (carry, *after):
            sums += _only(number == of[:, None], state[:, None])
        reads = features(q.astype(jnp.float32), degree) * weight_R[None, None, None]
        n = einsum("bchr,bchrw->bchw", reads, sums[..., 0, :, :] * sums[..., 1, :, :])
        return left(carry, writes, number, -1), n[..., :-1] / n[..., -1:]

    after: tuple[Any, ...] = ()
    if not causal:
        nothing = jnp.zeros_like(state, jnp.float32), jnp.full((batch,), -1)
        _, after = lax.scan(jax.checkpoint(behind), nothing, chunks, reverse=True)
        after = (after,)
    first = state.astype(jnp.float32), jnp.zeros((batch,), number.dtype)
    (state, _), o = lax.scan(jax.checkpoint(read), first, (chunks, after))
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(batch, -1, *o.shape[3:])[:, :length], state


def backward(q, k1, k2, v1, v2, state, segment_ids, do, dstate, **static) -> Any:
    """Gradients of q, k1, k2, v1, v2 and the initial state, float32."""
    inputs = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2, state))
    call = functools.partial(forward, segment_ids=segment_ids, **static)
    _, pullback = jax.vjp(call, *inputs)
    return pullback((do.astype(jnp.float32), dstate))


def _only(keep: jax.Array, x: jax.Array) -> jax.Array:
    """x, zero where keep, of its first dimensions, is false."""
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, 0.0)


def _chunks(x: jax.Array, **padding: Any) -> jax.Array:
    """[G, B, C, ...] of x [B, T, ...]."""
    count = -(-x.shape[1] // CHUNK)
    widths = [(0, 0), (0, count * CHUNK - x.shape[1]), *((0, 0),) * (x.ndim - 2)]
    x = jnp.pad(x, widths, **padding)
    return jnp.moveaxis(x.reshape(len(x), count, CHUNK, *x.shape[2:]), 1, 0)
