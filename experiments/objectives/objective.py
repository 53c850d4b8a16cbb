"""What a run minimises: the scalar and the sums of a batch, its work, and the metrics of sums.

An objective is a frozen dataclass, so that it can be a key of compiled programs. The scalar is the
mean over the batch that training minimises. The sums add up over batches, replicated or sharded,
and become metrics at the end: a metric never depends on the batch size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models.parts.variables import (
    AUXILIARY_LOSS,
    TRANSFER_ERROR,
    Report,
    by_layer,
    mean_over_layers,
)

# Names of the sums of what layers report end so: the value times the batch's weight.
REPORTED = "_reported"

Batch = Mapping[str, Any]
Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model.

    unit      what is counted, as a plural noun: "tokens", "images", "audio_seconds"
    count     how many of them the batch has
    places    how many places of sequences meet every weight of the model, or None where the
              objective does not know it: no utilisation is then reported
    outputs   how many places meet the weights of a vocabulary's output table
    length    T, the size of the axis after the rows of the batch's arrays along time, which the
              mesh's sequence axis cuts; None where nothing is to be cut
    """

    unit: str
    count: float
    places: int | None = None
    outputs: int = 0
    length: int | None = None


class Objective(Protocol):
    """What training minimises; implementations are frozen dataclasses."""

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        """The scalar [], and sums by name, among them loss_sum and weight_sum: the scalar is a mean
        over batches with weight_sum as their weights. All randomness comes from `key`."""
        ...

    def work(self, batch: Batch) -> Work:
        """The work of a batch without a replica axis, from the shapes of its arrays [B, ...].

        Raises ValueError for a batch that is not one for this objective."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics by name, of sums over any number of batches."""
        ...


def minimised(
    objective: Objective, model: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """The scalar that training minimises: the objective's, and the auxiliary loss of the layers
    (mean over those that have one). The sums have one more for each name that layers report; see
    models/parts/variables.py."""

    def run(model: Any) -> Any:
        return objective(model, batch, key)

    (value, sums), reports = nnx.capture(run, Report)(model)
    values = mean_over_layers(reports) | by_layer(reports, (TRANSFER_ERROR,))
    reported = {name + REPORTED: value * sums["weight_sum"] for name, value in values.items()}
    return value + values.get(AUXILIARY_LOSS, 0.0), sums | reported


def all_metrics(objective: Objective, sums: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's metrics, and what layers reported."""
    return objective.metrics(sums) | report_metrics(sums)


def report_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """What layers reported, by name: means over batches by their weight."""
    return {
        name.removesuffix(REPORTED): total / sums["weight_sum"]
        for name, total in sums.items()
        if name.endswith(REPORTED)
    }


def array_of(batch: Batch, name: str, objective: str) -> Any:
    """The array `name` of a batch. Raises ValueError, with the names that are there, without it."""
    if name not in batch:
        raise ValueError(
            f"a batch for the objective {objective} must have {name!r}; got {', '.join(batch)}"
        )
    return batch[name]


def weighted_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, 0 for a batch in which nothing counts."""
    return total / jnp.where(weight == 0, 1.0, weight)
