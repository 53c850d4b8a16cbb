"""Normalisation by the statistics of a batch, and the forms of it that SLAB trains with.

Guo, Chen, Tang, Wang, "SLAB: Efficient Transformers with Simplified Linear Attention and
Progressive Re-parameterized Batch Normalization", ICML 2024, arXiv 2405.11582, section 3.2:

    BN(x) = gamma (x - mu) / sqrt(var + eps) + beta
    RepBN(x) = BN(x) + eta x                         eta one learned number
    PRepBN(x) = lam LN(x) + (1 - lam) RepBN(x)       lam = (T - t) / T after t steps, 0 from T on

Statistics are taken over all tokens of the batch: in training, a token sees later ones. On a mesh
the batch is the whole of it, of one replica; a batch that is worked on in parts has the statistics
of each part. Running statistics move by a tenth in each training forward pass, to the mean and the
unbiased variance, and serve under `model.eval()`; they are variables of type `nnx.BatchStat` and so
in the checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.variables import StepsBefore

MOMENTUM = 0.1  # the share of a batch in the running statistics


class BatchNorm(nnx.Module):
    """BN(x), x [..., D] -> float32. `mask` bool [...] says which places there are: the others count
    for no statistics."""

    def __init__(
        self, features: int, *, eps: float, axis: str | None = None, param_dtype: DTypeLike
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features, param_dtype), out_sharding=(axis,))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype), out_sharding=(axis,))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.use_running_average = False

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, moves: jax.Array | bool = True
    ) -> jax.Array:
        """`moves`: whether a training pass moves the running statistics."""
        x = x.astype(jnp.float32)
        if self.use_running_average:
            mean_D, var_D = self.mean[...], self.var[...]
        else:
            mean_D, var_D, count = moments(x, mask)
            unbiased_D = var_D * count / jnp.maximum(count - 1, 1)
            for running, new_D in ((self.mean, mean_D), (self.var, unbiased_D)):
                step_D = MOMENTUM * (jax.lax.stop_gradient(new_D) - running[...])
                running[...] += jnp.where(jnp.asarray(moves) & (count > 0), step_D, 0.0)
        scale_D, bias_D = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        g_D = scale_D * jax.lax.rsqrt(var_D + self.eps)
        return (x - _along(mean_D, x)) * _along(g_D, x) + _along(bias_D, x)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """(g, shift), float32 and shaped like `scale`: under `model.eval()` this is g x + shift."""
        g = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(self.var[...] + self.eps)
        return g, self.bias[...].astype(jnp.float32) - g * self.mean[...]

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class RepBatchNorm(nnx.Module):
    """RepBN(x), x [..., D] -> float32; (1 + eta) x at a place that is not there."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        eta: float,
        axis: str | None = None,
        param_dtype: DTypeLike,
    ):
        self.batch = BatchNorm(features, eps=eps, axis=axis, param_dtype=param_dtype)
        self.eta = nnx.Param(jnp.asarray(eta, param_dtype), out_sharding=(), group="no_decay")

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, moves: jax.Array | bool = True
    ) -> jax.Array:
        x = x.astype(jnp.float32)
        y = self.batch(x, mask, moves=moves)
        if mask is not None:
            y = jnp.where(mask[..., None], y, x)
        return y + self.eta[...].astype(jnp.float32) * x

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """As of `BatchNorm`: eta joins g."""
        g, shift = self.batch.affine()
        return g + self.eta[...].astype(jnp.float32)[..., None], shift


class ProgressiveBatchNorm(nnx.Module):
    """PRepBN(x), x [..., D] -> float32: LN(x) alone for `warmup_steps`, then lam falls from 1 to 0
    in `steps`; RepBN(x) under `model.eval()`, whatever the step.

    t is what the trainer sets before each step (`StepsBefore`). Running statistics move after the
    warm-up. LN has an eps of 1e-6."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        eta: float,
        steps: int,
        warmup_steps: int,
        axis: str | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.steps, self.warmup_steps = steps, warmup_steps
        self.layer = nnx.LayerNorm(
            features,
            epsilon=1e-6,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            scale_metadata={"out_sharding": (axis,)},
            bias_metadata={"out_sharding": (axis,)},
            rngs=rngs,
        )
        self.rep = RepBatchNorm(features, eps=eps, eta=eta, axis=axis, param_dtype=param_dtype)
        self.before = StepsBefore(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if self.rep.batch.use_running_average:
            return self.rep(x, mask)
        t = self.before[...] - self.warmup_steps
        batch = self.rep(x, mask, moves=t >= 0)
        lam = layer_norm_share(t, self.steps)
        return lam * self.layer(x) + (1.0 - lam) * batch

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """As of `RepBatchNorm`."""
        return self.rep.affine()


def masked_norm(norm: Any, x_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """norm(x), float32; of a norm of batches, by statistics of the tokens that the mask keeps."""
    if mask_BT is None or not isinstance(norm, BatchNorm | RepBatchNorm | ProgressiveBatchNorm):
        return norm(x_BTD)
    return norm(x_BTD, mask_BT)


def layer_norm_share(t: jax.Array, steps: int) -> jax.Array:
    """lam after t steps: 1 before, (T - t) / T up to T = `steps`, 0 from then on."""
    if steps == 0:
        return jnp.where(t < 0, 1.0, 0.0)
    return jnp.clip((steps - t).astype(jnp.float32) / steps, 0.0, 1.0)


def moments(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | int]:
    """Mean and biased variance [D] over the places that are there, and their number."""
    axes = tuple(range(x.ndim - 1))
    if mask is None:
        mean_D = jnp.mean(x, axes)
        return mean_D, jnp.mean(jnp.square(x - _along(mean_D, x)), axes), x.size // x.shape[-1]
    there = mask[..., None]
    count = jnp.sum(mask, dtype=jnp.float32)
    mean_D = jnp.sum(jnp.where(there, x, 0.0), axes) / jnp.maximum(count, 1.0)
    apart = jnp.where(there, x - _along(mean_D, x), 0.0)
    return mean_D, jnp.sum(jnp.square(apart), axes) / jnp.maximum(count, 1.0), count


def _along(v_D: jax.Array, x: jax.Array) -> jax.Array:
    """v_D as [1, ..., 1, D], of x's rank."""
    return v_D.reshape((1,) * (x.ndim - 1) + (-1,))
