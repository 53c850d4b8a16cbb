"""Standardisation without parameters: by an instance's own statistics, by those of its batch, and
by groups of channels both ways (G-IBS of HyperZ.Z.W, arXiv 2401.17948).

    IS(x) = (x - mean_t) / sqrt(var_t + eps)      for each channel, over the places of an instance
    BS(x) = (x - mean_bt) / sqrt(var_bt + eps)    over those of all instances
    G-IBS                                         groups of channels in turns: BS, IS, BS, ...

Variances are biased, eps is 1e-5. The statistics of a batch are those of the instances that are
there: a batch that is filled up has those that it would have without what fills it. They are taken
of the batch under `model.eval()`, too, as published: what a model says of an instance then depends
on its neighbours. With `running` their running averages serve there, as in
models/blocks/batch_norm.py, and it does not. On a mesh the batch is the whole of it, of one
replica; a batch that is worked on in parts has the statistics of each part."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.blocks.batch_norm import MOMENTUM, moments

EPS = 1e-5


def standardised(x_BTC: jax.Array) -> jax.Array:
    """IS(x), float32."""
    x_BTC = x_BTC.astype(jnp.float32)
    x_BTC = x_BTC - jnp.mean(x_BTC, axis=1, keepdims=True)
    return x_BTC * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTC), axis=1, keepdims=True) + EPS)


class OfBatch(nnx.Module):
    """A statistic of a batch -> itself, or under `model.eval()`, if it is kept, the running average
    of those of training."""

    def __init__(self, shape: tuple[int, ...], start: float, *, kept: bool):
        self.average = nnx.BatchStat(jnp.full(shape, start, jnp.float32)) if kept else None
        self.use_running_average = False

    def __call__(
        self, value: jax.Array, count: jax.Array | int, moved_to: jax.Array | None = None
    ) -> jax.Array:
        """count: of what the statistic is taken; of nothing it moves no average. moved_to: what the
        average moves to, if not to the statistic."""
        if self.average is None:
            return value
        if self.use_running_average:
            return self.average[...]
        new = jax.lax.stop_gradient(value if moved_to is None else moved_to)
        step = MOMENTUM * (new - self.average[...])
        self.average[...] += jnp.where(jnp.asarray(count) > 0, step, 0.0)
        return value

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchStandardisation(nnx.Module):
    """BS(x), float32, of x [B, T, C]; `there` bool [B]: the instances that count, None for all."""

    def __init__(self, channels: int, *, running: bool):
        self.mean = OfBatch((channels,), 0.0, kept=running)
        self.var = OfBatch((channels,), 1.0, kept=running)

    def __call__(self, x_BTC: jax.Array, there_B: jax.Array | None) -> jax.Array:
        x_BTC = x_BTC.astype(jnp.float32)
        mask_BT = None
        if there_B is not None:
            mask_BT = jnp.broadcast_to(there_B[:, None], x_BTC.shape[:2])
        mean_C, var_C, count = moments(x_BTC, mask_BT)
        unbiased_C = var_C * count / jnp.maximum(count - 1, 1)
        mean_C = self.mean(mean_C, count)
        var_C = self.var(var_C, count, unbiased_C)
        return (x_BTC - mean_C[None, None]) * jax.lax.rsqrt(var_C + EPS)[None, None]


class GroupedStandardisation(nnx.Module):
    """G-IBS(x), float32; called as `BatchStandardisation`.

    Raises ValueError unless `groups` divide the channels."""

    def __init__(self, channels: int, *, groups: int, running: bool):
        if channels % groups:
            raise ValueError(
                "groups must divide the channels of every block, which lift (or the image) and"
                f" factors make; got groups={groups} for {channels} channels"
            )
        self.group = channels // groups
        self.batch = BatchStandardisation(channels, running=running)

    def __call__(self, x_BTC: jax.Array, there_B: jax.Array | None) -> jax.Array:
        number_C = jnp.arange(x_BTC.shape[-1]) // self.group
        even_C = (number_C % 2 == 0)[None, None]
        return jnp.where(even_C, self.batch(x_BTC, there_B), standardised(x_BTC))
