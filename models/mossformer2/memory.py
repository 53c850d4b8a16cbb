"""R, the recurrent module of MossFormer2: a feed-forward sequential memory (FSMN), no recurrence.

    h = LN(PReLU(x W_1 + b_1))
    a = F(h),  b = F(h)                                 F with a layer norm
    h <- b FSMN(a) + h                                  FSMN(a) + h where `gated` is False
    R(x) = LN(h) W_2 + b_2

    p = relu(a W_h + b_h) W_p
    FSMN(a) = a + DDN(p)                                of `layers` dense layers
    FSMN(a) = a + p + conv(p)                           without them: of 2 order - 1 taps

Layer l = 0, 1, ... of DDN reads c_l = [y_{l-1} | ... | y_0 | p], the newest first, l + 1 times the
channels: channel d of what it returns reads the channels d (l + 1), ..., d (l + 1) + l of c_l,
which are neighbours in c_l and so of one layer mostly, not the same channel of each (as in the
authors' code, whose convolution has as many groups as channels):

    y_l = PReLU(IN(sum of their convolutions))          2 order - 1 taps, a dilation of 2^l

IN normalises each channel over the tokens of a segment, with a learned scale and shift; PReLU has
one slope here for each channel, and one for all in h."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.mossformer2.convolution import ConvolvedMap, centred_convolution
from models.parts.norms import layer_norm
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection

NORM_EPS = 1e-5
SLOPE = 0.25  # what slopes start from


class RecurrentModule(nnx.Module):
    """R: x_BTD -> y_BTD, of numbers of segments [B, T] or None for one."""

    def __init__(
        self,
        width: int,
        *,
        inner: int,
        order: int,
        layers: int,
        gated: bool,
        conv_width: int,
        dropout: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}

        def norm() -> Any:
            return layer_norm(inner, eps=NORM_EPS, rngs=rngs, param_dtype=param_dtype)

        def convolved() -> ConvolvedMap:
            given: dict[str, Any] = {"taps": conv_width, "dropout": dropout, "rngs": rngs}
            return ConvolvedMap(norm(), inner, inner, (None, None), **given, **dtypes)

        self.first = _dense(width, inner, ("embed", None), rngs=rngs, **dtypes)
        self.slope = nnx.Param(jnp.full(1, SLOPE, param_dtype), out_sharding=(None,))
        self.first_norm, self.last_norm = norm(), norm()
        self.value = convolved()
        self.gate = convolved() if gated else None
        self.memory = Memory(inner, order=order, layers=layers, rngs=rngs, **dtypes)
        self.last = _dense(inner, width, (None, "embed"), rngs=rngs, **dtypes)

    def __call__(self, x_BTD: jax.Array, number_BT: jax.Array | None) -> jax.Array:
        h = self.first_norm(prelu(self.first(x_BTD), self.slope[0]))
        remembered = self.memory(self.value(h, number_BT), number_BT)
        if self.gate is not None:
            remembered = self.gate(h, number_BT) * remembered
        return self.last(self.last_norm(remembered.astype(jnp.float32) + h))


class Memory(nnx.Module):
    """FSMN(a), a [B, T, C]."""

    def __init__(self, channels: int, *, order: int, layers: int, rngs: nnx.Rngs, **dtypes: Any):
        self.hidden = _dense(channels, channels, (None, None), rngs=rngs, **dtypes)
        self.projected = _dense(channels, channels, (None, None), bias=False, rngs=rngs, **dtypes)
        taps, param_dtype = 2 * order - 1, dtypes["param_dtype"]
        self.weight_WC = (
            None
            if layers
            else nnx.Param(
                FAN_IN_UNIFORM(rngs.params(), (taps, channels), param_dtype),
                out_sharding=(None, None),
            )
        )
        self.layers = nnx.List(
            DenseLayer(channels, place, taps=taps, rngs=rngs, param_dtype=param_dtype)
            for place in range(layers)
        )

    def __call__(self, a_BTC: jax.Array, number_BT: jax.Array | None) -> jax.Array:
        p_BTC = self.projected(jax.nn.relu(self.hidden(a_BTC)))
        if self.weight_WC is not None:
            return a_BTC + p_BTC + centred_convolution(p_BTC, self.weight_WC[...], number_BT)
        newest_first = [p_BTC]
        for layer in self.layers:
            newest_first.insert(0, layer(jnp.concatenate(newest_first, axis=-1), number_BT))
        return a_BTC + newest_first[0]


class DenseLayer(nnx.Module):
    """Layer `place` of DDN: [B, T, (place + 1) C] -> [B, T, C]."""

    def __init__(
        self, channels: int, place: int, *, taps: int, rngs: nnx.Rngs, param_dtype: DTypeLike
    ):
        self.inputs, self.dilation = place + 1, 2**place
        start = fan_in_bias(taps * self.inputs)
        weight_WI = start(rngs.params(), (taps, channels * self.inputs), param_dtype)
        self.weight_WI = nnx.Param(weight_WI, out_sharding=(None, None))
        self.scale_C = nnx.Param(jnp.ones(channels, param_dtype), out_sharding=(None,))
        self.shift_C = nnx.Param(jnp.zeros(channels, param_dtype), out_sharding=(None,))
        self.slope_C = nnx.Param(jnp.full(channels, SLOPE, param_dtype), out_sharding=(None,))

    def __call__(self, c_BTI: jax.Array, number_BT: jax.Array | None) -> jax.Array:
        y_BTI = centred_convolution(c_BTI, self.weight_WI[...], number_BT, dilation=self.dilation)
        y_BTC = y_BTI.reshape(*y_BTI.shape[:2], -1, self.inputs).sum(axis=-1)
        scale_C, shift_C, slope_C = (
            param[...].astype(jnp.float32)[None, None]
            for param in (self.scale_C, self.shift_C, self.slope_C)
        )
        normed_BTC = instance_norm(y_BTC, number_BT) * scale_C + shift_C
        return prelu(normed_BTC, slope_C).astype(c_BTI.dtype)


def prelu(x: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


def instance_norm(x_BTC: jax.Array, number_BT: jax.Array | None) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-5) of each channel over the tokens of each segment; float32."""
    x_BTC = x_BTC.astype(jnp.float32)
    x_BTC = x_BTC - segment_means(x_BTC, number_BT)
    return x_BTC * jax.lax.rsqrt(segment_means(jnp.square(x_BTC), number_BT) + NORM_EPS)


def segment_means(x_BTC: jax.Array, number_BT: jax.Array | None) -> jax.Array:
    """The mean over its segment, of each token: [B, T, C], or [B, 1, C] for one segment."""
    if number_BT is None:
        return jnp.mean(x_BTC, axis=1, keepdims=True)
    return _segment_sums(x_BTC, number_BT) / segment_counts(x_BTC, number_BT)


def segment_counts(x_BTC: jax.Array, number_BT: jax.Array | None) -> jax.Array:
    """How many tokens its segment has, of each token: [B, T, 1], or [1, 1, 1]; float32."""
    if number_BT is None:
        return jnp.full((1, 1, 1), x_BTC.shape[1], jnp.float32)
    return _segment_sums(jnp.ones((*number_BT.shape, 1), jnp.float32), number_BT)


def _segment_sums(x_BTC: jax.Array, number_BT: jax.Array) -> jax.Array:
    def one(x_TC: jax.Array, number_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_TC, number_T, num_segments=len(number_T))[number_T]

    return jax.vmap(one)(x_BTC, number_BT)


def _dense(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool = True,
    **given: Any,
) -> nnx.Linear:
    start = fan_in_bias(inputs)
    return projection(
        inputs, outputs, axes, init=FAN_IN_UNIFORM, bias=bias, bias_init=start, **given
    )
