"""The MLPs of the blocks."""

import functools
import math

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.projections import projection, residual_normal


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
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dense = functools.partial(
            projection, bias=bias, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        inner = inner or inner_width(width, ratio)
        self.gate = dense(width, inner, ("embed", "mlp"))
        self.up = dense(width, inner, ("embed", "mlp"))
        self.down = dense(inner, width, ("mlp", "embed"), init=residual_normal(depth))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class GELU(nnx.Module):
    """y = gelu(x W_up + b_up) W_down + b_down, ratio * width inside: the MLP of GPT-2 and of ViT
    (arXiv 2010.11929)."""

    def __init__(
        self,
        width: int,
        *,
        ratio: float,
        inner: int = 0,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        inner = inner or round(ratio * width)
        self.up = dense(width, inner, ("embed", "mlp"))
        self.down = dense(inner, width, ("mlp", "embed"), init=residual_normal(depth))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=False))


MLPS = {"swiglu": SwiGLU, "gelu": GELU}
