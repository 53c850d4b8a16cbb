"""Gaussian-kernel attention through landmarks with all matrices written out, in float32: the
definition that every other implementation is held to."""

import functools

import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _kernel(x, y, scale):
    """exp(-scale |x_i - y_j|^2 / 2) [B, H, X, Y] of x [B, X, H, K] and y [B, Y, H, K]."""
    difference = x[:, :, None] - y[:, None]
    return jnp.exp(-0.5 * scale * jnp.moveaxis((difference**2).sum(-1), 3, 1))


def _inverse(A, same, iterations):
    """The Newton iterate [B, H, m, m] and its residual [B, H, m], that of a landmark's document."""

    def of_document(x):  # [B, H, m] of sums over rows
        return einsum("bij,bhj->bhi", same.astype(jnp.float32), x)

    row_sum = jnp.max(jnp.where(same[:, None], A.sum(-1)[:, :, None], 0.0), axis=-1)
    first = jnp.where(row_sum > 0, 1.8 / jnp.where(row_sum > 0, row_sum, 1.0) ** 2, 0.0)
    size = of_document((A**2).sum(-1))

    def residual(Y):
        R = einsum("bhij,bhjk,bhkl->bhil", A, Y, A) - A
        ratio = of_document((R**2).sum(-1)) / jnp.where(size > 0, size, 1.0)
        return jnp.sqrt(ratio)

    def step(_, current):
        Y, error = current
        next_Y = 2 * Y - einsum("bhij,bhjk,bhkl->bhil", Y, A, Y)
        next_error = residual(next_Y)
        better = next_error < error
        return jnp.where(better[..., None], next_Y, Y), jnp.where(better, next_error, error)

    Y = first[..., None] * A
    return lax.fori_loop(0, iterations, step, (Y, residual(Y)))


def gaussian_attention(
    q,
    landmarks,
    v,
    key_mask,
    documents,
    landmark_documents,
    *,
    scale,
    normalise,
    iterations,
    jitter,
):
    """o = P^T A^+ (P v) [B, T, H, V] in float32, and the residual [B, H]; shapes as in `api.py`."""
    q, landmarks, v = (x.astype(jnp.float32) for x in (q, landmarks, v))
    A, P = _kernel(landmarks, landmarks, scale), _kernel(landmarks, q, scale)
    same = jnp.ones((A.shape[0], *A.shape[2:]), bool)
    if documents is not None:
        same = landmark_documents[:, :, None] == landmark_documents[:, None, :]
        sees = landmark_documents[:, :, None] == documents[:, None, :]
        A, P = jnp.where(same[:, None], A, 0.0), jnp.where(sees[:, None], P, 0.0)
    if key_mask is not None:
        P = jnp.where(key_mask[:, None, None, :], P, 0.0)
        v = jnp.where(key_mask[:, :, None, None], v, 0.0)

    fixed = lax.stop_gradient(A + jitter * jnp.eye(A.shape[-1])[None, None])
    Y, error = lax.stop_gradient(_inverse(fixed, same, iterations))
    # The value of Y, and the derivative -Y dA Y of an inverse.
    Y = Y - einsum("bhij,bhjk,bhkl->bhil", Y, A - lax.stop_gradient(A), Y)
    if normalise:
        D = A.sum(-1) ** -0.5
        Y = D[..., :, None] * Y * D[..., None, :]
    o = einsum("bhmt,bhmn,bhns,bshv->bthv", P, Y, P, v)
    return o, error.max(-1)
