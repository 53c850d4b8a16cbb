"""Squared error of one number per prompt of vectors: regression in context."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean


@dataclass(frozen=True)
class SquaredError:
    """Squared error of the prediction for a prompt, without the factor 1/2 that some papers write.

    Batch: examples float [B, N+1, d+1]; target and weights float [B].
    Sums over prompts: loss_sum, weight_sum, and target_square_sum, the loss of the prediction 0.
    Metrics: loss (the risk) and normalised_loss (that of the zero predictor is 1)."""

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        prediction_B = model(array_of(batch, "examples", "SquaredError"))
        target_B, weights_B = batch["target"], batch["weights"].astype(jnp.float32)
        error_B = jnp.where(weights_B > 0, prediction_B.astype(jnp.float32) - target_B, 0.0)
        sums = {
            "loss_sum": jnp.sum(weights_B * jnp.square(error_B)),
            "weight_sum": jnp.sum(weights_B),
            "target_square_sum": jnp.sum(weights_B * jnp.square(target_B)),
        }
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        examples, length, _ = array_of(batch, "examples", "SquaredError").shape
        places = examples * length
        return Work(unit="examples", count=places, places=places, length=length)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "loss": float(sums["loss_sum"] / sums["weight_sum"]),
            "normalised_loss": float(sums["loss_sum"] / sums["target_square_sum"]),
        }
