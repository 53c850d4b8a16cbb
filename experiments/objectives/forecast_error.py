"""Squared error of forecasts of several variates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean


@dataclass(frozen=True)
class ForecastError:
    """Mean squared error of all numbers that a window forecasts.

    Batch: history float [B, L, V]; future [B, S, V]; weights [B]; optional history_calendar
    [B, L, C].
    Sums over windows, each the mean over its S V numbers: loss_sum, absolute_sum; the same of the
    forecast that repeats the last row of the history, last_square_sum, last_absolute_sum;
    weight_sum.
    Metrics: mse, mae; last_mse, last_mae."""

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        history_BLV = array_of(batch, "history", "ForecastError")
        future_BSV, weights_B = batch["future"], batch["weights"].astype(jnp.float32)
        forecast_BSV = model(history_BLV, batch.get("history_calendar"))

        def mean(error_BSV: jax.Array) -> jax.Array:
            # A choice, not a product with zero: what fills up a batch must not reach the loss.
            error_B = jnp.where(weights_B > 0, jnp.mean(error_BSV, axis=(1, 2)), 0.0)
            return jnp.sum(weights_B * error_B)

        error_BSV = forecast_BSV.astype(jnp.float32) - future_BSV
        last_BSV = history_BLV[:, -1:] - future_BSV
        sums = {
            "loss_sum": mean(jnp.square(error_BSV)),
            "absolute_sum": mean(jnp.abs(error_BSV)),
            "last_square_sum": mean(jnp.square(last_BSV)),
            "last_absolute_sum": mean(jnp.abs(last_BSV)),
            "weight_sum": jnp.sum(weights_B),
        }
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        # Which weights meet variates and which meet rows is the model's affair.
        return Work(unit="windows", count=array_of(batch, "history", "ForecastError").shape[0])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "mse": float(sums["loss_sum"] / sums["weight_sum"]),
            "mae": float(sums["absolute_sum"] / sums["weight_sum"]),
            "last_mse": float(sums["last_square_sum"] / sums["weight_sum"]),
            "last_mae": float(sums["last_absolute_sum"] / sums["weight_sum"]),
        }
