"""The MLPs of the blocks.

`dropout` is that of the inner activations and that of what comes out."""

import functools
import math
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.projections import (
    FAN_IN_UNIFORM,
    NORMAL,
    XAVIER,
    ZEROS,
    fan_in_bias,
    projection,
    residual_normal,
)

# How the maps start, by name: "normal": N(0, 0.02^2), and less by sqrt(2 depth) for the one that
# writes to the stream; "fan_in": weights and biases U(+-fan_in^-1/2); "xavier": weights
# Xavier-uniform.
INITS = ("normal", "fan_in", "xavier")


def _starts(init: str, inputs: int, first: Any = NORMAL) -> dict[str, Any]:
    """The initialisers of a map of `inputs`, which starts as `first` under "normal"."""
    if init == "normal":
        return {"init": first, "bias_init": ZEROS}
    if init == "xavier":
        return {"init": XAVIER, "bias_init": ZEROS}
    return {"init": FAN_IN_UNIFORM, "bias_init": fan_in_bias(inputs)}


def _dropout(rate: float, rngs: nnx.Rngs) -> Any:
    """Dropout, or the identity without random state."""
    return nnx.Dropout(rate, rngs=rngs) if rate else None


def inner_width(width: int, ratio: float) -> int:
    """2/3 * ratio * width: three matrices then cost what two of an ungated MLP of `ratio` cost.

    Rounded up to a multiple of 256 from width 1024 on, where the published models are, and of 8
    below, where 256 would be most of it."""
    multiple = 256 if width >= 1024 else 8
    return multiple * math.ceil(2 * ratio * width / 3 / multiple)


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down (Shazeer 2020, arXiv 2002.05202); `bias` adds b to all
    three products."""

    def __init__(
        self,
        width: int,
        *,
        ratio: float,
        inner: int = 0,
        bias: bool = False,
        init: str = "normal",
        dropout: float = 0.0,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dense = functools.partial(
            projection, bias=bias, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        inner = inner or inner_width(width, ratio)
        self.gate = dense(width, inner, ("embed", "mlp"), **_starts(init, width))
        self.up = dense(width, inner, ("embed", "mlp"), **_starts(init, width))
        last = _starts(init, inner, residual_normal(depth))
        self.down = dense(inner, width, ("mlp", "embed"), **last)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTM = jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)
        if self.dropout is None:
            return self.down(h_BTM)
        return self.dropout(self.down(self.dropout(h_BTM)))


class GELU(nnx.Module):
    """y = gelu(x W_up + b_up) W_down + b_down, ratio * width inside: the MLP of GPT-2 and of ViT
    (arXiv 2010.11929)."""

    approximate = False

    def __init__(
        self,
        width: int,
        *,
        ratio: float,
        inner: int = 0,
        init: str = "normal",
        dropout: float = 0.0,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        inner = inner or round(ratio * width)
        self.up = dense(width, inner, ("embed", "mlp"), **_starts(init, width))
        last = _starts(init, inner, residual_normal(depth))
        self.down = dense(inner, width, ("mlp", "embed"), **last)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTM = jax.nn.gelu(self.up(x_BTD), approximate=self.approximate)
        if self.dropout is None:
            return self.down(h_BTM)
        return self.dropout(self.down(self.dropout(h_BTM)))


class TanhGELU(GELU):
    """The same with GELU's approximation by tanh: the MLP of GPT-2's code and of DiT (arXiv
    2212.09748)."""

    approximate = True


MLPS = {"swiglu": SwiGLU, "gelu": GELU, "gelu_tanh": TanhGELU}
