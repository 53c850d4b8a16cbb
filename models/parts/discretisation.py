"""From a continuous diagonal system h' = Lambda h + u to the recurrence h_t = Lbar h_{t-1} + f u_t,
and the step sizes Delta with which Mamba and the gated delta rules start.

    zoh         Lbar = exp(z)                      f = (exp(z) - 1) / Lambda        z = Lambda Delta
    bilinear    Lbar = (1 + z/2) / (1 - z/2)       f = Delta / (1 - z/2)

Both have the steady state -u / Lambda of the continuous system exactly; they agree to second order
in z."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def zero_order_hold(eigenvalue: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lbar and f, complex64, for u constant during each step.

    Values and gradients of f keep their digits at eigenvalue 0."""
    z = eigenvalue * step
    factor = jnp.exp(z)
    # exp(z) - 1 and its derivative cancel there; the series is cut after z^8 / 9! < 1e-10.
    small = jnp.abs(z) < 0.25
    series = jnp.ones_like(z)
    for n in range(9, 1, -1):
        series = 1 + z / n * series
    return factor, step * jnp.where(small, series, (factor - 1) / jnp.where(small, 1, z))


def bilinear(eigenvalue: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lbar and f, complex64, by the trapezoidal rule."""
    half = eigenvalue * step / 2
    return (1 + half) / (1 - half), step / (1 - half)


DISCRETISATIONS: dict[str, Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]] = {
    "zoh": zero_order_hold,
    "bilinear": bilinear,
}


def step_range_log(dt_min: float, dt_max: float) -> tuple[float, float]:
    """The logarithms of the bounds of initial step sizes. Raises ValueError unless 0 < dt_min <=
    dt_max."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"need 0 < dt_min <= dt_max; got dt_min={dt_min}, dt_max={dt_max}")
    return math.log(dt_min), math.log(dt_max)


def dt_bias(key: jax.Array, channels: int, dt_min: float, dt_max: float) -> jax.Array:
    """b with softplus(b) log-uniform on [dt_min, dt_max], not below 1e-4."""
    bounds = step_range_log(dt_min, dt_max)
    dt_E = jnp.exp(jax.random.uniform(key, (channels,), jnp.float32, *bounds))
    dt_E = jnp.maximum(dt_E, 1e-4)
    # The inverse of softplus; log(1 - e^-dt) itself would cancel.
    return dt_E + jnp.log(-jnp.expm1(-dt_E))
