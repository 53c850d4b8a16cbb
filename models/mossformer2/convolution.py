"""F, the map of which MossFormer2 is made, and its convolution over both sides of a token.

F(x) = drop(h + conv(h)),   h = silu(norm(x) W + b)         conv: of each channel, no bias
ScaleNorm(x) = g x / max(|x| / sqrt(D), 1e-5)               g one learned number"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection
from ops.short_convolution.api import short_convolution

SMALLEST = 1e-5  # of |x| / sqrt(D)


class ScaleNorm(nnx.Module):
    """x [..., D] -> float32."""

    def __init__(self, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(1, param_dtype), out_sharding=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        # The larger of the squares, not of their roots: the gradient at 0 is finite.
        square = jnp.maximum(jnp.mean(x * x, axis=-1, keepdims=True), SMALLEST**2)
        return x * jax.lax.rsqrt(square) * self.scale[0].astype(jnp.float32)


class ConvolvedMap(nnx.Module):
    """F: x [B, T, inputs] and numbers of segments [B, T] (None: one) to [B, T, outputs]."""

    def __init__(
        self,
        norm: Any,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        taps: int,
        dropout: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        self.norm = norm
        self.dense = projection(
            inputs,
            outputs,
            axes,
            init=FAN_IN_UNIFORM,
            bias=True,
            bias_init=fan_in_bias(inputs),
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        weight_WD = FAN_IN_UNIFORM(rngs.params(), (taps, outputs), param_dtype)
        self.weight_WD = nnx.Param(weight_WD, out_sharding=(None, axes[1]))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x: jax.Array, number_BT: jax.Array | None) -> jax.Array:
        h_BTD = jax.nn.silu(self.dense(self.norm(x)))
        h_BTD = h_BTD + centred_convolution(h_BTD, self.weight_WD[...], number_BT)
        return h_BTD if self.dropout is None else self.dropout(h_BTD)


def centred_convolution(
    x_BTD: jax.Array, weight_WD: jax.Array, number_BT: jax.Array | None, *, dilation: int = 1
) -> jax.Array:
    """y_t = sum_i w_i x_{t + (i - W // 2) dilation} of each channel, [B, T, D] in x's dtype; W odd,
    x zero beyond the segment of t, whose numbers [B, T] do not decrease.

    Both halves of the taps are a short convolution, one of which runs backwards."""
    if dilation > 1:
        return _dilated(x_BTD, weight_WD, number_BT, dilation)
    weight_WD = weight_WD.astype(x_BTD.dtype)
    half = weight_WD.shape[0] // 2
    past_BTD, _ = short_convolution(x_BTD, weight_WD[: half + 1], segment_ids=number_BT)
    if half == 0:
        return past_BTD
    # Walking backwards the last tap is of the token itself, which `past` has read.
    future_WD = jnp.pad(weight_WD[:half:-1], ((0, 1), (0, 0)))
    future_BTD, _ = short_convolution(x_BTD, future_WD, segment_ids=number_BT, reverse=True)
    return past_BTD + future_BTD


def _dilated(
    x_BTD: jax.Array, weight_WD: jax.Array, number_BT: jax.Array | None, dilation: int
) -> jax.Array:
    """The tokens of each remainder by `dilation` as a sequence of their own."""
    batch, length, width = x_BTD.shape
    pad = -length % dilation

    def apart(array: jax.Array) -> jax.Array:
        array = array.reshape(batch, -1, dilation, *array.shape[2:])
        return jnp.swapaxes(array, 1, 2).reshape(batch * dilation, -1, *array.shape[3:])

    x = apart(jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0))))
    number = None
    if number_BT is not None:
        number = apart(jnp.pad(number_BT, ((0, 0), (0, pad)), mode="edge"))
    y = centred_convolution(x, weight_WD, number).reshape(batch, dilation, -1, width)
    return jnp.swapaxes(y, 1, 2).reshape(batch, length + pad, width)[:, :length]
