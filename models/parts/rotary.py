"""Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864), with fixed and with learned
angles, and with angles slowed down for contexts longer than those of training."""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.parts.options import Range

# From 1 on, so that no pair turns faster than the first.
RopeBase = Annotated[float, Range(1, 1e12)]


def check_pairs(head_size: int, option: str = "heads") -> int:
    """The head size; raises ValueError, naming the option to change, if its channels do not form
    pairs."""
    if head_size % 2:
        raise ValueError(
            "rotary positions turn pairs of channels and need an even head size; got"
            f" {head_size}: change {option}"
        )
    return head_size


def frequencies(size: int, base: float) -> jax.Array:
    """base^(-2i/size) for the size/2 pairs of `size` channels."""
    half = size // 2
    return float(base) ** (-jnp.arange(half, dtype=jnp.float32) / half)


def turn(x_BTHK: jax.Array, positions_BT: jax.Array, frequency_K: jax.Array) -> jax.Array:
    """x with its pairs (x_i, x_{i + K/2}) turned by the angles position * frequency_K[i], i < K/2.

    Angles are float32.

    The product of a turned query and a turned key depends on the difference of their positions
    alone."""
    angle_BTK = positions_BT.astype(jnp.float32)[..., None] * frequency_K[None, None, :]
    cos_BTHK, sin_BTHK = (jnp.cos(angle_BTK)[:, :, None, :], jnp.sin(angle_BTK)[:, :, None, :])
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        (first * cos_BTHK - second * sin_BTHK, first * sin_BTHK + second * cos_BTHK), axis=-1
    )
    return turned.astype(x_BTHK.dtype)


def rotate(
    x_BTHK: jax.Array, positions_BT: jax.Array, *, base: float, scaling: tuple[Any, ...] = ()
) -> jax.Array:
    """`turn` by the fixed angles of RoPE, position * base^(-2i/K); K even.

    With a `scaling` by those of `scaled_frequencies`, and times its factor."""
    if not scaling:
        return turn(x_BTHK, positions_BT, frequencies(x_BTHK.shape[-1], base))
    frequency_K, factor = scaled_frequencies(x_BTHK.shape[-1], base, scaling)
    turned = turn(x_BTHK, positions_BT, jnp.asarray(frequency_K))
    return turned if factor == 1.0 else (factor * turned).astype(x_BTHK.dtype)


# The numbers that follow the name of a scaling.
SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor", "trained_length"),
    "llama3": ("factor", "low_frequency", "high_frequency", "trained_length"),
    "yarn": ("factor", "beta_fast", "beta_slow", "trained_length", "attention_factor"),
}


def check_scaling(scaling: tuple[Any, ...]) -> None:
    """Raises ValueError unless `scaling` is () or the name of one with its numbers, all above 0."""
    if not scaling:
        return
    name, *numbers = scaling
    known = "; ".join(f"({', '.join((repr(n), *SCALINGS[n]))})" for n in SCALINGS)
    fits = name in SCALINGS and len(numbers) == len(SCALINGS[name])
    if not fits or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError(f"rope_scaling must be () or one of {known}; got {scaling!r}")


def scaled_frequencies(
    size: int, base: float, scaling: tuple[Any, ...]
) -> tuple[np.ndarray, float]:
    """Frequencies float32 [size/2] for long contexts, and the factor of queries and keys.

    linear    all divided by `factor` (Chen et al. 2023, arXiv 2306.15595)
    dynamic   as they are: within `trained_length` tokens it changes nothing, and beyond, all angles
              would change with the length of the whole text, which no recurrence can follow
    llama3    those that turn less than `low_frequency` times in `trained_length` tokens divided by
              `factor`, those above `high_frequency` as they are, between them in proportion
              (Llama 3.1, arXiv 2407.21783, as in the released code)
    yarn      the same with a ramp over the pairs between the turns `beta_slow` and `beta_fast`, and
              queries and keys times `attention_factor` (Peng et al. 2023, arXiv 2309.00071)
    """
    name, factor, *numbers = scaling
    half = size // 2
    frequency_K = base ** (-np.arange(half) / half)
    if name == "dynamic":
        return frequency_K.astype(np.float32), 1.0
    slow_K, attention_factor = frequency_K / factor, 1.0
    if name == "linear":
        share_K = np.zeros(half)
    elif name == "llama3":
        low, high, length = numbers
        share_K = (length * frequency_K / (2 * math.pi) - low) / (high - low)
    else:
        fast, slow, length, attention_factor = numbers

        def pair(turns: float) -> float:
            """The pair, as a fraction, that turns so often in `length` tokens."""
            return half * math.log(length / (turns * 2 * math.pi)) / math.log(base)

        first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), size - 1)
        share_K = 1 - (np.arange(half) - first) / max(last - first, 1e-3)
    share_K = np.clip(share_K, 0, 1)
    return (slow_K + share_K * (frequency_K - slow_K)).astype(np.float32), attention_factor


class LearnedRotation(nnx.Module):
    """LRPE (Qin et al. 2023, arXiv 2307.09270): `turn` by learned angles that start as RoPE's."""

    def __init__(self, head_size: int, option: str = "heads"):
        theta_K = frequencies(check_pairs(head_size, option), 10000.0)
        self.theta_K = nnx.Param(theta_K, group="no_decay", out_sharding=(None,))

    def __call__(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return turn(x_BTHK, positions_BT, self.theta_K[...])
