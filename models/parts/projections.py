"""Linear maps, initialisers and head sizes that the mixers share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Factor, check_value

NORMAL = nnx.initializers.normal(0.02)
# The authors' code of GLA and DeltaNet: Xavier-uniform with gain 2^-2.5; a gain enters the variance
# squared.
XAVIER_SMALL = nnx.initializers.variance_scaling((2**-2.5) ** 2, "fan_avg", "uniform")
# The authors' code of TransNormer: Xavier-uniform with gain 2^-0.5.
XAVIER_MEDIUM = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
XAVIER = nnx.initializers.xavier_uniform()
# U(-fan_in^-1/2, fan_in^-1/2): the uniform distribution on +-b has variance b^2 / 3.
FAN_IN_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
ZEROS = nnx.initializers.zeros_init()


def fan_in_bias(inputs: int) -> Any:
    """U(-inputs^-1/2, inputs^-1/2), of the bias beside a map of FAN_IN_UNIFORM: PyTorch's layers
    start so, and the models of authors who say nothing else."""
    end = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -end, end)


def residual_normal(depth: int) -> jax.nn.initializers.Initializer:
    """N(0, 0.02^2 / (2 depth)), for the 2 depth maps that write to the residual stream.

    As in GPT-2 (Radford et al. 2019, section 2.3)."""
    return nnx.initializers.normal(0.02 / math.sqrt(2 * depth))


def projection(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    *,
    init: jax.nn.initializers.Initializer = NORMAL,
    bias: bool = False,
    bias_init: jax.nn.initializers.Initializer = ZEROS,
    group: str | None = None,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> nnx.Linear:
    """x W (+ b), W [inputs, outputs] with logical axis names `axes`.

    Computed in `compute_dtype`. group: of W, where it is not what its axes say."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=init,
        kernel_metadata={"out_sharding": axes, **({"group": group} if group else {})},
        bias_init=bias_init,
        bias_metadata={"out_sharding": axes[1:]},
        dtype=compute_dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def tied_dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """Dropout of [B, T, D] that draws once for all tokens of a sequence, off under `model.eval()`;
    None for the rate 0, so that a layer without it carries no random state."""
    return nnx.Dropout(rate, broadcast_dims=(1,), rngs=rngs) if rate else None


def head_size(width: int, heads: int, expand: float = 1.0, option: str = "heads") -> int:
    """Size of one of `heads` heads that split `expand * width` channels.

    Raises ValueError, naming the option that counts them, if they do not divide, and for an
    `expand` that is no finite factor."""
    check_value("expand_k, expand_v or expand", Factor, expand)
    channels = round(expand * width)
    if heads < 1 or channels < heads or channels % heads:
        raise ValueError(
            f"{option} must divide the {channels} channels (width {width} times expansion"
            f" {expand:g}); got {option}={heads}"
        )
    return channels // heads


def split_heads(x_BTD: jax.Array, heads: int) -> jax.Array:
    """[B, T, heads * K] -> [B, T, heads, K]."""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, -1)


def merge_heads(x_BTHK: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, H * K]."""
    return x_BTHK.reshape(*x_BTHK.shape[:-2], -1)
