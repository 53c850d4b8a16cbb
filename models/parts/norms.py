"""Normalisations that models share; all computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class Identity(nnx.Module):
    """x -> x, without parameters."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


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


class PlainLayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) over the last dimension, in float32; it learns nothing."""

    def __init__(self, eps: float):
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return simple_rms_norm(x, self.eps)


class ZeroCentredRMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + scale) over the last dimension; returns float32."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        axis: str | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros((features,), param_dtype), out_sharding=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = simple_rms_norm(x, self.eps)
        scale = 1 + self.scale[...].astype(jnp.float32)
        return y * scale.reshape((1,) * (y.ndim - 1) + (-1,))


def simple_rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a learned scale; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_normalise(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in float32.

    eps stands inside the root, so that gradients at 0 are finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)
