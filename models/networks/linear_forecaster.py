"""Linear maps from history to forecast, the baseline. Zeng, Chen, Zhang, Xu, "Are Transformers
Effective for Time Series Forecasting?", AAAI 2023, arXiv 2205.13504.

    y_v = x_v W + b                                                      Linear
    y_v = trend_v W_t + b_t + (x_v - trend_v) W_s + b_s                  DLinear, decomposition=True

    x_v     history of variate v, in R^L
    trend   mean of x over `kernel` rows around each, ends repeated beyond the history
    W, b    L x S, the same for all variates

With instance_norm each history is standardised first and its forecast scaled back, as in
models/networks/forecaster.py; NLinear of the paper subtracts the last value instead. Calendar
features are not read. W and b start as U(+-L^-1/2).

Departures: the paper's option of maps of their own for each variate is not there.

Authors' code: https://github.com/cure-lab/LTSF-Linear"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.networks.forecaster import check_inputs, standardised
from models.parts.options import Size, check_options
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection


class LinearForecaster(nnx.Module):
    """Histories of any number of variates to forecasts; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        context: int,
        horizon: int,
        calendar: int,
        instance_norm: bool = True,
        decomposition: bool = False,
        kernel: Size = 25,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, as many rows on both sides; got {kernel}")
        self.context, self.calendar = context, calendar
        self.instance_norm, self.kernel = instance_norm, kernel

        def dense() -> nnx.Linear:
            return projection(
                context,
                horizon,
                (None, None),
                init=FAN_IN_UNIFORM,
                bias=True,
                bias_init=fan_in_bias(context),
                rngs=rngs,
                param_dtype=param_dtype,
                compute_dtype=compute_dtype,
            )

        self.output = dense()
        self.trend = dense() if decomposition else None

    def __call__(self, history_BLV: jax.Array, calendar_BLC: jax.Array | None = None) -> jax.Array:
        """As `Forecaster`; the calendar is not read."""
        check_inputs(history_BLV, calendar_BLC, self.context, self.calendar)
        x_BLV, mean_B1V, sigma_B1V = jnp.asarray(history_BLV, jnp.float32), 0.0, 1.0
        if self.instance_norm:
            x_BLV, mean_B1V, sigma_B1V = standardised(history_BLV)
        x_BVL = jnp.swapaxes(x_BLV, 1, 2)
        if self.trend is None:
            y_BVS = self.output(x_BVL)
        else:
            trend_BVL = moving_average(x_BVL, self.kernel)
            y_BVS = self.trend(trend_BVL) + self.output(x_BVL - trend_BVL)
        return jnp.swapaxes(y_BVS, 1, 2).astype(jnp.float32) * sigma_B1V + mean_B1V


def moving_average(x_BVL: jax.Array, kernel: int) -> jax.Array:
    """Means over `kernel` neighbours along the last axis, the ends repeated beyond it."""
    side = kernel // 2
    padded = jnp.pad(x_BVL, ((0, 0), (0, 0), (side, side)), mode="edge")
    windows = jax.lax.reduce_window(padded, 0.0, jax.lax.add, (1, 1, kernel), (1, 1, 1), "VALID")
    return windows / kernel


def build(
    model_config: Mapping[str, Any],
    *,
    context: int,
    horizon: int,
    calendar: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> LinearForecaster:
    """The model of a config's `model` section (without its name).

    instance_norm    whether histories are standardised, each by its own mean and variance
    decomposition    a map for the trend and one for what is left of it
    kernel           rows that a mean of the trend is over, odd

    Raises ValueError for unknown options."""
    sizes: dict[str, Any] = {"context": context, "horizon": horizon, "calendar": calendar}
    supplied = (*sizes, "rngs", "param_dtype", "compute_dtype")
    check_options(
        "model linear_forecaster", "model", model_config, LinearForecaster, supplied=supplied
    )
    dtypes: dict[str, Any] = {
        "param_dtype": jnp.dtype(param_dtype),
        "compute_dtype": jnp.dtype(compute_dtype),
    }
    return LinearForecaster(rngs=rngs, **sizes, **dtypes, **model_config)
