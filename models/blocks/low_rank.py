"""Low-rank adaptation of a mixer's linear maps. Hu et al., "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, arXiv 2106.09685.

    y = x W (+ b) + (alpha / r) (x A) B        A [inputs, r], B [r, outputs]

A starts as U(+-inputs^-1/2) and B at zero, so that a fresh map is the one without A and B. W keeps
its name: a run that starts from one without A and B finds it.

kind="rslora" has alpha / sqrt(r) in the place of alpha / r (Kalajdzievski, 2023, arXiv 2312.03732).
kind="dora" learns the lengths of the columns of V = W + (alpha / r) A B apart (Liu et al., "DoRA",
ICML 2024, arXiv 2402.09353, Eq. 5), as 1 + g of those of W, g starting at 0:

    y = x V diag((1 + g) |W|_c / |V|_c) (+ b)           |V|_c has no gradient (section 4.3 there)"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.parts.projections import FAN_IN_UNIFORM

KINDS = ("lora", "rslora", "dora")


def lora_scale(kind: str, rank: int, alpha: float) -> float:
    """The factor of A B."""
    return alpha / (math.sqrt(rank) if kind == "rslora" else rank)


class LowRank(nnx.Module):
    """A linear map and what is added to it."""

    def __init__(
        self, linear: nnx.Linear, *, rank: int, alpha: float, kind: str = "lora", rngs: nnx.Rngs
    ):
        inputs, outputs = linear.kernel.shape[-2:]
        kept = linear.kernel.get_metadata().get("out_sharding") or (None, None)
        self.kernel, self.bias, self.compute_dtype = linear.kernel, linear.bias, linear.dtype
        self.scale = lora_scale(kind, rank, alpha)
        dtype = linear.kernel.dtype
        lora_a = FAN_IN_UNIFORM(rngs.params(), (inputs, rank), dtype)
        self.lora_a = nnx.Param(lora_a, out_sharding=(kept[-2], None))
        self.lora_b = nnx.Param(jnp.zeros((rank, outputs), dtype), out_sharding=(None, kept[-1]))
        self.lora_gain = (
            nnx.Param(jnp.zeros((outputs,), dtype), out_sharding=(kept[-1],))
            if kind == "dora"
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, lora_a, lora_b = (
            array.astype(self.compute_dtype)
            for array in (x, self.kernel[...], self.lora_a[...], self.lora_b[...])
        )
        y = x @ kernel + self.scale * ((x @ lora_a) @ lora_b)
        if self.lora_gain is not None:
            gain = self.lora_gain[...]
            factor = lengths_factor(self.kernel[...], self.scale * (lora_a @ lora_b), gain)
            y = y * factor.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.compute_dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def lengths_factor(kernel: jax.Array, added: jax.Array, gain: jax.Array) -> jax.Array:
    """(1 + g) |W|_c / |W + added|_c, one for each output, float32."""
    kernel, added = kernel.astype(jnp.float32), added.astype(jnp.float32)
    before, after = (jnp.sqrt(jnp.sum(jnp.square(w), axis=-2)) for w in (kernel, kernel + added))
    return (1 + gain.astype(jnp.float32)) * before / jax.lax.stop_gradient(after)


def merged(
    kernel: Any, lora_a: Any, lora_b: Any, lora_gain: Any = None, *, kind: str, alpha: float
) -> jax.Array:
    """The one kernel that does what W, A, B and g do, float32; of several layers in their order."""
    kernel, lora_a, lora_b = (jnp.asarray(x, jnp.float32) for x in (kernel, lora_a, lora_b))
    added = lora_scale(kind, lora_a.shape[-1], alpha) * jnp.matmul(lora_a, lora_b)
    if lora_gain is None:
        return kernel + added
    return (kernel + added) * lengths_factor(kernel, added, jnp.asarray(lora_gain))[..., None, :]


def adapt(
    mixer: Any,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    kind: str = "lora",
    rngs: nnx.Rngs,
) -> None:
    """Gives the linear maps of a mixer that have these names A and B. Raises ValueError for a name
    that is no linear map of it, with those that are."""
    maps = [name for name, value in vars(mixer).items() if isinstance(value, nnx.Linear)]
    for name in targets:
        if name not in maps:
            raise ValueError(
                f"lora_targets must be linear maps of {type(mixer).__name__}:"
                f" {', '.join(sorted(maps))}; got {name!r}"
            )
        linear = getattr(mixer, name)
        setattr(mixer, name, LowRank(linear, rank=rank, alpha=alpha, kind=kind, rngs=rngs))
