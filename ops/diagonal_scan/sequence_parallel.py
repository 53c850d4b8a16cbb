"""The diagonal scan with time cut over devices, by the rules of
`ops/framework/sequence_parallel.py`.

E_t is the product of the factors up to t, which the op itself computes from ones without input; the
last one is the transition A. For complex numbers, as pairs of reals, the transposed of a product
with a is one with its conjugate."""

import jax
import jax.numpy as jnp

from ..framework.sequence_parallel import Affine


def multiply(a, h):
    """The product of two numbers, each a tuple of one real array or of real and imaginary part."""
    if len(a) == 1:
        return (a[0] * h[0],)
    (a_re, a_im), (h_re, h_im) = a, h
    return a_re * h_re - a_im * h_im, a_re * h_im + a_im * h_re


def multiply_or_zero(a, h):
    """a h, zero where one of them is: a state that has overflowed counts for nothing once another
    has started."""
    zero = [jnp.all(jnp.stack([part == 0 for part in z]), 0) for z in (a, h)]
    return tuple(jnp.where(zero[0] | zero[1], 0.0, part) for part in multiply(a, h))


def multiply_conjugate(a, h):
    """conj(a) h, zero where one of them is."""
    return multiply_or_zero((a[0], *(-part for part in a[1:])), h)


def _response(rules, a, like, segment_ids):
    """E [B, T, N] and A [B, N]; like: a number [B, T, N]."""
    (batch, _, channels), parts = like[0].shape, len(like)
    nothing = tuple(jnp.zeros(part.shape, jnp.float32) for part in like)
    one = jnp.ones((batch, channels), jnp.float32)
    ones = (one, *(jnp.zeros_like(one),) * (parts - 1))
    return rules.forward(a, nothing, ones, segment_ids)


def summary(rules, a, b, segment_ids):
    """A, M [B, N], and h as a function of the state before."""
    zero = tuple(jnp.zeros_like(part[:, 0], jnp.float32) for part in b)
    h, M = rules.forward(a, b, zero, segment_ids)
    E, A = _response(rules, a, b, segment_ids)

    def read(S):
        from_before = multiply_or_zero(E, tuple(part[:, None] for part in S))
        return jax.tree.map(lambda x, y: (x + y).astype(x.dtype), h, from_before), None

    return A, M, read


def adjoint(rules, a, h, S, segment_ids, dh):
    """A, and E^T dh [B, N]."""
    del S
    E, A = _response(rules, a, h, segment_ids)
    dh = jax.tree.map(lambda x: x.astype(jnp.float32), dh)
    return A, jax.tree.map(lambda x: x.sum(axis=1), multiply_conjugate(E, dh))


RULES = Affine(summary, adjoint, multiply_or_zero, multiply_conjugate, split=True)
