"""Low-rank adaptation of a mixer's linear maps. Hu et al., "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, arXiv 2106.09685.

    y = x W (+ b) + (alpha / r) (x A) B        A [inputs, r], B [r, outputs]

A starts as U(+-inputs^-1/2) and B at zero, so that a fresh map is the one without A and B. W keeps
its name: a run that starts from one without A and B finds it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.parts.projections import FAN_IN_UNIFORM


class LowRank(nnx.Module):
    """A linear map and what is added to it."""

    def __init__(self, linear: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        inputs, outputs = linear.kernel.shape[-2:]
        kept = linear.kernel.get_metadata().get("out_sharding") or (None, None)
        self.kernel, self.bias, self.compute_dtype = linear.kernel, linear.bias, linear.dtype
        self.scale = alpha / rank
        dtype = linear.kernel.dtype
        lora_a = FAN_IN_UNIFORM(rngs.params(), (inputs, rank), dtype)
        self.lora_a = nnx.Param(lora_a, out_sharding=(kept[-2], None))
        self.lora_b = nnx.Param(jnp.zeros((rank, outputs), dtype), out_sharding=(None, kept[-1]))

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel, lora_a, lora_b = (
            array.astype(self.compute_dtype)
            for array in (x, self.kernel[...], self.lora_a[...], self.lora_b[...])
        )
        y = x @ kernel + self.scale * ((x @ lora_a) @ lora_b)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.compute_dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def adapt(mixer: Any, targets: Sequence[str], *, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
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
        setattr(mixer, name, LowRank(linear, rank=rank, alpha=alpha, rngs=rngs))
