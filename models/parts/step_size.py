"""The initial step sizes that Mamba introduced and the gated delta rules took over."""

import math

import jax
import jax.numpy as jnp


def dt_bias(key: jax.Array, channels: int, smallest: float, largest: float) -> jax.Array:
    """b with softplus(b) log-uniform on [smallest, largest], not below 1e-4."""
    dt_E = jnp.exp(
        jax.random.uniform(key, (channels,), jnp.float32, math.log(smallest), math.log(largest))
    )
    dt_E = jnp.maximum(dt_E, 1e-4)
    # The inverse of softplus; log(1 - e^-dt) itself would cancel.
    return dt_E + jnp.log(-jnp.expm1(-dt_E))
