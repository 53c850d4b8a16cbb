"""The numbers of a run that its programs take as arguments: runs that differ in nothing else, such
as those of a sweep over learning rates or seeds, share what is compiled."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training.state import seed_array

# Tables of rates are at least this long, and then the next power of two: runs that differ in their
# number of steps mostly share a program.
SHORTEST_TABLE = 1024


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("value", "complement"), meta_fields=()
)
@dataclass(frozen=True)
class Decay:
    """A decay d of moments or averages, as optax uses one: d x, 1 - d, d ** n.

    1 - d comes rounded from float64: of d = 0.999 in float32 it would be wrong in its fifth
    digit."""

    value: Any
    complement: Any

    @classmethod
    def of(cls, decay: float) -> "Decay":
        return cls(np.float32(decay), np.float32(1 - decay))

    def __mul__(self, factor: Any) -> Any:
        return self.value * factor

    def __rsub__(self, one: float) -> Any:
        if one != 1:
            raise ValueError(f"of a decay only 1 - decay is known; got {one} - decay")
        return self.complement

    def __pow__(self, exponent: Any) -> Any:
        return self.value**exponent


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "seeds",
        "rates",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "clip_norm",
        "ssm_scale",
        "average_step",
    ),
    meta_fields=(),
)
@dataclass(frozen=True)
class Hyperparameters:
    """seeds         uint32 [R] of R > 1 replicas, or [] of one
    rates         learning rate after n updates, float32 [at least steps]
    b1, b2        decays of the moments
    ssm_scale     rate of the groups "ssm" and "ssm_decay" over that of the others
    average_step  1 - config.ema_decay; Decay for its complement

    The others are those of config.optimizer. Which of them are 0, and so do nothing, is part of a
    program."""

    seeds: Any
    rates: Any
    b1: Decay
    b2: Decay
    eps: Any
    weight_decay: Any
    clip_norm: Any
    ssm_scale: Any
    average_step: Any

    def rate(self, count: Any) -> Any:
        """The learning rate after `count` updates: an optax.Schedule."""
        return jnp.take(self.rates, count, mode="clip")


def hyperparameters(
    options: Mapping[str, Any],
    schedule: optax.Schedule,
    steps: int,
    *,
    seeds: Sequence[int] = (0,),
    ema_decay: float = 0.0,
) -> Hyperparameters:
    """Those of a run of `steps` steps; `options` is config.optimizer. NumPy arrays."""
    return Hyperparameters(
        seeds=seed_array(seeds),
        rates=rate_table(schedule, steps),
        b1=Decay.of(options["b1"]),
        b2=Decay.of(options["b2"]),
        eps=np.float32(options["eps"]),
        weight_decay=np.float32(options["weight_decay"]),
        clip_norm=np.float32(options["clip_norm"]),
        ssm_scale=np.float32(options["ssm_lr"] / options["lr"]),
        average_step=Decay.of(1 - ema_decay),
    )


def rate_table(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """float32 [at least steps]: the rates of updates 0, 1, ..., evaluated once, all together."""
    length = max(SHORTEST_TABLE, 1 << (steps - 1).bit_length())
    # Compiled: to the bit what the schedule is inside the program of a step.
    rates = jax.jit(schedule)(np.arange(length, dtype=np.int32))
    return np.array(np.broadcast_to(np.asarray(rates, np.float32), (length,)))
