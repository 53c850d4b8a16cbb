"""Diagonal convolution in plain JAX on every backend: a kernel made of powers, and the FFT.

    kernel_l = sum_m Re(c_m a_m^l b_m)        final state = sum_s a^(T-1-s) b u_s

Inside, a complex number has a complex dtype. The powers, D M T numbers, are made anew in the
backward pass."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ..long_convolution.api import long_convolution

Parts = tuple[jax.Array, ...]  # (array,) or (real, imaginary)

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def number(parts: Parts) -> jax.Array:
    """The number of these parts: complex64 where there are two."""
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def parts_of(number: jax.Array) -> Parts:
    """The parts of a number: two of a complex one."""
    return (number.real, number.imag) if jnp.iscomplexobj(number) else (number,)


def powers(a_DM: jax.Array, length: int) -> jax.Array:
    """a^l, l = 0 .. length - 1: [D, M, length] in the dtype of `a_DM`, by doubling.

    Products alone, as in the recurrence; exp(l log a) would lose the digits of the phase for large
    l."""
    result, factor = jnp.ones_like(a_DM)[..., None], a_DM[..., None]
    while result.shape[-1] < length:
        result = jnp.concatenate([result, result * factor], axis=-1)
        factor = factor * factor
    return result[..., :length]


def forward(
    u: jax.Array, a: Parts, b: Parts, c: Parts, reverse: bool = False
) -> tuple[jax.Array, Parts]:
    """y [B, T, D] and the parts of the final state [B, D, M], from a zero state; float32."""
    if reverse:
        y_BTD, state = forward(u[:, ::-1], a, b, c)
        return y_BTD[:, ::-1], state

    @jax.checkpoint
    def kernel_and_state(
        a_DM: jax.Array, b_DM: jax.Array, c: Parts, u_BTD: jax.Array
    ) -> tuple[jax.Array, Parts]:
        writes = parts_of(b_DM[..., None] * powers(a_DM, u_BTD.shape[1]))
        reads = (c[0], *(-part for part in c[1:]))  # Re(c h) = Re c Re h - Im c Im h
        kernel_DT = einsum("xdm,xdmt->dt", jnp.stack(reads), jnp.stack(writes))
        state = (einsum("dmt,btd->bdm", part_DMT[..., ::-1], u_BTD) for part_DMT in writes)
        return kernel_DT, tuple(state)

    kernel_DT, state = kernel_and_state(number(a), number(b), c, u)
    return long_convolution(u, kernel_DT), state
