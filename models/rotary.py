"""Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864)."""

import jax
import jax.numpy as jnp


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, *, base: float) -> jax.Array:
    """Turns the pair (x_i, x_{i + K/2}) by the angle position * base^(-2i/K), i < K/2; K even, angles in float32.

    The product of a rotated query and a rotated key depends on the difference of their positions alone.
    """
    half = x_BTHK.shape[-1] // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTK = positions_BT.astype(jnp.float32)[..., None] * frequency_K[None, None, :]
    cos_BTHK, sin_BTHK = jnp.cos(angle_BTK)[:, :, None, :], jnp.sin(angle_BTK)[:, :, None, :]
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos_BTHK - second * sin_BTHK, first * sin_BTHK + second * cos_BTHK), axis=-1)
    return rotated.astype(x_BTHK.dtype)
