"""A convolution as long as the sequence that stops where another segment starts.

A convolution that is not a recurrence has no state to reset. Time is split in the middle:

    tokens      0  1  2  3 | 4  5  6  7
    segments    a  a  b  b | b  c  c  c         the middle lies in segment b

A pair of tokens (s, t) with s in the first half and t in the second is in one segment only where
both are in the one that holds the middle. So tokens 2 and 3, with zeros in the place of 0 and 1,
are convolved into the second half, and the result is added to token 4 alone. Each half then goes on
by itself. Stretches of 16 tokens are done directly. This is exact, and costs log T convolutions
instead of one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..framework import segments
from ..short_convolution.api import short_convolution

DIRECT = 16  # tokens


def convolve_documents(
    u_BTD: jax.Array,
    kernel_DT: jax.Array,
    segment_ids: jax.Array,
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """y_t = sum of kernel_l u_{t-l} over the lags l that stay in t's segment: [B, T, D], float32.

    convolve(u [B, T, D], kernel [D, T]) is the causal convolution of one segment."""
    length = u_BTD.shape[1]
    padded = max(DIRECT, 1 << (length - 1).bit_length())
    behind = padded - length
    u_BTD = jnp.pad(u_BTD.astype(jnp.float32), ((0, 0), (0, behind), (0, 0)))
    kernel_DT = jnp.pad(kernel_DT.astype(jnp.float32), ((0, 0), (0, behind)))
    # Numbers that never fall: ids may come back.
    number_BT = jnp.pad(segments.numbers(segment_ids), ((0, 0), (0, behind)), constant_values=-1)

    stretch_T = jnp.arange(padded) // DIRECT
    y_BTD, _ = short_convolution(
        u_BTD,
        kernel_DT[:, :DIRECT].T[::-1],
        segment_ids=number_BT * (padded // DIRECT) + stretch_T[None],
    )
    half = DIRECT
    while half < padded:
        y_BTD = y_BTD + _across_middles(u_BTD, kernel_DT[:, : 2 * half], number_BT, convolve)
        half *= 2
    return y_BTD[:, :length]


def _across_middles(
    u_BTD: jax.Array,
    kernel_DL: jax.Array,
    number_BT: jax.Array,
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """What passes over the middle of each stretch of L tokens: [B, T, D]."""
    half, width = kernel_DL.shape[1] // 2, u_BTD.shape[-1]
    pairs = (u_BTD.shape[0], -1, 2, half)  # sequence, stretch, first or second half, token
    number, u = number_BT.reshape(pairs), u_BTD.reshape(*pairs, width)
    middle = number[:, :, 0, -1:]
    source = jnp.where((number[:, :, 0] == middle)[..., None], u[:, :, 0], 0.0)
    source = jnp.pad(source, ((0, 0), (0, 0), (0, half), (0, 0)))
    y = convolve(source.reshape(-1, 2 * half, width), kernel_DL).reshape(*pairs, width)[:, :, 1]
    y = jnp.where((number[:, :, 1] == middle)[..., None], y, 0.0)
    return jnp.stack([jnp.zeros_like(y), y], axis=2).reshape(u_BTD.shape)
