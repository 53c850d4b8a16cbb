"""Normalisations that models share; all computed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def rms_norm(
    features: int, *, eps: float, axis: str | None = None, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> nnx.RMSNorm:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension; returns float32 whatever x is."""
    return nnx.RMSNorm(
        features,
        epsilon=eps,
        # nnx casts the input to this before it takes the mean square.
        dtype=jnp.float32,
        param_dtype=param_dtype,
        scale_metadata={"out_sharding": (axis,)},
        rngs=rngs,
    )


def layer_norm(
    features: int, *, eps: float, axis: str | None = None, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> nnx.LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last dimension, in float32."""
    return nnx.LayerNorm(
        features,
        epsilon=eps,
        use_fast_variance=False,  # mean(x^2) - mean(x)^2 cancels
        dtype=jnp.float32,
        param_dtype=param_dtype,
        scale_metadata={"out_sharding": (axis,)},
        bias_metadata={"out_sharding": (axis,)},
        rngs=rngs,
    )


def batch_norm(
    features: int, *, eps: float, axis: str | None = None, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> nnx.BatchNorm:
    """(x - mean) / sqrt(var + eps) * scale + bias per channel; returns float32.

    Mean and variance are taken over all other dimensions, and each call moves the running ones a
    tenth of the way there; under `model.eval()` the running ones are used and do not change."""
    return nnx.BatchNorm(
        features,
        epsilon=eps,
        momentum=0.9,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        scale_metadata={"out_sharding": (axis,)},
        bias_metadata={"out_sharding": (axis,)},
        rngs=rngs,
    )


def masked_norm(norm: Any, x_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """norm(x), float32; of a batch norm with a mask, by statistics of the tokens that it keeps."""
    if mask_BT is None or not isinstance(norm, nnx.BatchNorm):
        return norm(x_BTD)
    return norm(x_BTD, mask=mask_BT[..., None])


NORMS = {"rms": rms_norm, "layer": layer_norm, "batch": batch_norm}


def simple_rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a learned scale; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_normalise(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32.

    eps stands inside the root, so that gradients at 0 are finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)
