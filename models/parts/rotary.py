"""Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864), with fixed and with learned
angles."""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from models.parts.options import Range

# From 1 on, so that no pair turns faster than the first.
RopeBase = Annotated[float, Range(1, 1e12)]


def check_pairs(head_size: int, option: str = "heads") -> int:
    """The head size; raises ValueError, naming the option to change, if its channels do not form
    pairs."""
    if head_size % 2:
        raise ValueError(
            "rotary positions turn pairs of channels and need an even head size; got"
            f" {head_size}: change {option}"
        )
    return head_size


def frequencies(size: int, base: float) -> jax.Array:
    """base^(-2i/size) for the size/2 pairs of `size` channels."""
    half = size // 2
    return float(base) ** (-jnp.arange(half, dtype=jnp.float32) / half)


def turn(x_BTHK: jax.Array, positions_BT: jax.Array, frequency_K: jax.Array) -> jax.Array:
    """x with its pairs (x_i, x_{i + K/2}) turned by the angles position * frequency_K[i], i < K/2.

    Angles are float32.

    The product of a turned query and a turned key depends on the difference of their positions
    alone."""
    angle_BTK = positions_BT.astype(jnp.float32)[..., None] * frequency_K[None, None, :]
    cos_BTHK, sin_BTHK = (jnp.cos(angle_BTK)[:, :, None, :], jnp.sin(angle_BTK)[:, :, None, :])
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        (first * cos_BTHK - second * sin_BTHK, first * sin_BTHK + second * cos_BTHK), axis=-1
    )
    return turned.astype(x_BTHK.dtype)


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, *, base: float) -> jax.Array:
    """`turn` by the fixed angles of RoPE, position * base^(-2i/K); K even."""
    return turn(x_BTHK, positions_BT, frequencies(x_BTHK.shape[-1], base))


class LearnedRotation(nnx.Module):
    """LRPE (Qin et al. 2023, arXiv 2307.09270): `turn` by learned angles that start as RoPE's."""

    def __init__(self, head_size: int):
        theta_K = frequencies(check_pairs(head_size), 10000.0)
        self.theta_K = nnx.Param(theta_K, group="no_decay", out_sharding=(None,))

    def __call__(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return turn(x_BTHK, positions_BT, self.theta_K[...])
