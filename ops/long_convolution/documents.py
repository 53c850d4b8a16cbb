"""A convolution as long as the sequence that stops at the boundaries of packed documents.

A convolution that is not a recurrence has no state to reset. Split time in the middle: of the pairs
(s, t) across it, those within one document have s and t in the document that holds the middle,
which is a contiguous stretch. So the first half, without tokens of other documents, is convolved
into the second half and added to that document's tokens there; each half goes on by itself, and
stretches of 16 tokens are done directly. That is exact, and costs log T convolutions instead of
one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..short_convolution.api import short_convolution

DIRECT = 16  # tokens


def document_convolution(
    x_BTD: jax.Array,
    kernel_DT: jax.Array,
    document_BT: jax.Array,
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """y_t = sum of kernel_l x_{t-l} over the lags l that stay in t's document; float32.

    document_BT: numbers of documents, non-decreasing. convolve(u [B, T, D], kernel [D, T]) is the
    causal convolution."""
    batch, length, width = x_BTD.shape
    padded = max(DIRECT, 1 << (length - 1).bit_length())
    more = padded - length
    x_BTD = jnp.pad(x_BTD.astype(jnp.float32), ((0, 0), (0, more), (0, 0)))
    kernel_DT = jnp.pad(kernel_DT.astype(jnp.float32), ((0, 0), (0, more)))
    document_BT = jnp.pad(document_BT, ((0, 0), (0, more)), constant_values=-1)

    stretch_T = jnp.arange(padded) // DIRECT
    y_BTD, _ = short_convolution(
        x_BTD,
        kernel_DT[:, :DIRECT].T[::-1],
        segment_ids=document_BT * (padded // DIRECT) + stretch_T[None],
    )
    half = DIRECT
    while half < padded:
        pairs = (batch, padded // (2 * half), 2, half)
        number, x = document_BT.reshape(pairs), x_BTD.reshape(*pairs, width)
        middle = number[:, :, 0, -1:]
        source = jnp.where((number[:, :, 0] == middle)[..., None], x[:, :, 0], 0.0)
        source = jnp.pad(source, ((0, 0), (0, 0), (0, half), (0, 0)))
        across = convolve(source.reshape(-1, 2 * half, width), kernel_DT[:, : 2 * half]).reshape(
            *pairs, width
        )[:, :, 1]
        across = jnp.where((number[:, :, 1] == middle)[..., None], across, 0.0)
        across = jnp.stack([jnp.zeros_like(across), across], axis=2)
        y_BTD = y_BTD + across.reshape(x_BTD.shape)
        half *= 2
    return y_BTD[:, :length]
