"""Polynomial Kronecker attention as a scan over tokens in float32: the definition that every other
implementation is held to."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def monomials(size: int, degree: int) -> list[tuple[int, ...]]:
    """The multi-indices a of C(size + degree, degree) monomials, each as the places that it
    multiplies, by degree."""
    return [
        places
        for power in range(degree + 1)
        for places in itertools.combinations_with_replacement(range(size), power)
    ]


def features(x, degree):
    """prod_l x_l^a_l [..., R] of x [..., K]."""
    return jnp.stack(
        [jnp.prod(x[..., list(places)], axis=-1) for places in monomials(x.shape[-1], degree)], -1
    )


def weights(size, degree, scale):
    """scale^|a| / a!, [R]."""
    return jnp.asarray(
        [
            scale ** len(a) / math.prod(math.factorial(a.count(i)) for i in set(a))
            for a in monomials(size, degree)
        ],
        jnp.float32,
    )


def polynomial_kronecker_attention(
    q, k1, k2, v1, v2, state, segment_ids, *, degree, scale, causal, reverse
):
    """o [B, T, H, V] and the final state in float32; shapes as in `api.py`."""
    q, k1, k2, v1, v2, state = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2, state))
    starts_BT = jnp.zeros(q.shape[:2], bool)
    if segment_ids is not None:
        changes_BT = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts_BT = jnp.pad(changes_BT, ((0, 0), (0, 1) if reverse else (1, 0)))
    reads = features(q, degree) * weights(q.shape[-1], degree, scale)[None, None, None]
    keys = jnp.stack([features(k1, degree), features(k2, degree)], axis=3)
    values = jnp.stack([v1, v2], axis=3)
    values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)

    def step(state, token):
        key, value, starts = token
        state = jnp.where(starts[:, None, None, None, None], 0.0, state)
        state = state + einsum("bhsr,bhsw->bhsrw", key, value)
        return state, state

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (keys, values, starts_BT))
    last, states = lax.scan(step, state, tokens, reverse=reverse)
    states = jnp.moveaxis(states, 0, 1)
    if not causal:  # every token reads what its segment has come to at its end
        length = q.shape[1]
        number_BT = jnp.cumsum(starts_BT, axis=1)
        end_BT = jax.vmap(lambda number: jnp.searchsorted(number, number, side="right"))(number_BT)
        states = jax.vmap(lambda x, end: x[end - 1])(states, jnp.minimum(end_BT, length))
    n = einsum("bthr,bthrw->bthw", reads, states[:, :, :, 0] * states[:, :, :, 1])
    return n[..., :-1] / n[..., -1:], last
