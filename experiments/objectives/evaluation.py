"""What an evaluation is: anything that gives metrics of a trained model.

`Sums` adds an objective's sums up over examples. A sampler, or a score over features of samples, is
another class with the same `run`."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from experiments.objectives.objective import Batch, Objective, Work, all_metrics, minimised

Metrics = dict[str, list[float]]
# (model, batch, key) -> a tree of arrays; pure, and hashable by what it computes.
OfModel = Callable[[Any, Any, jax.Array], Any]


class Apply(Protocol):
    """The model of a run on the run's mesh, and how examples reach it."""

    replicas: int

    def __call__(self, function: OfModel, params: Any, batch: Any, key: jax.Array) -> Any:
        """function(model, batch, key) of every replica: arrays [R, ...], whole in every process.

        Compiled once for each function and shape, and not waited for: hand the next batch over
        before you read a result. The model is in evaluation mode (no dropout). All replicas see the
        same batch and the same key."""
        ...

    def batches(
        self, examples: Any, work: Callable[[Batch], Work] | None = None
    ) -> Iterable[Batch]:
        """The examples (an `Examples`, as many of them as the config asks for) as batches on the
        mesh, all of one shape: rows that fill up the last one have weight 0. `work` counts a batch
        and so says which of its arrays have a time axis; None: they are not cut along time."""
        ...


class Evaluation(Protocol):
    """Metrics of a model."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names; those of `Sums` follow from its objective."""
        ...

    def run(self, apply: Apply, params: Any, key: jax.Array) -> Metrics:
        """{metric: [one value per replica]}. `params` is what `apply` takes: the parameters and
        variables of all replicas. The same key gives the same metrics, at any step of training."""
        ...


@functools.cache
def sums_of(objective: Objective) -> OfModel:
    """(model, batch, key) -> the sums of the objective and of what layers report; the same function
    for the same objective, so that it is compiled once."""

    def sums(model: Any, batch: Any, key: jax.Array) -> Mapping[str, jax.Array]:
        return minimised(objective, model, batch, key)[1]

    return sums


@dataclass(frozen=True)
class Sums:
    """The metrics of an objective over examples (an `Examples`, whose metrics do not depend on how
    they are cut into batches)."""

    examples: Any
    objective: Objective
    metrics: tuple[str, ...] = ()

    def run(self, apply: Apply, params: Any, key: jax.Array) -> Metrics:
        function = sums_of(self.objective)
        per_batch = jax.device_get(
            [
                apply(function, params, batch, jax.random.fold_in(key, number))
                for number, batch in enumerate(apply.batches(self.examples, self.objective.work))
            ]
        )
        sums = {
            name: np.sum([each[name].astype(np.float64) for each in per_batch], axis=0)
            for name in per_batch[0]
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            metrics = [
                all_metrics(self.objective, {name: sums[name][replica] for name in sums})
                for replica in range(apply.replicas)
            ]
        return {name: [float(values[name]) for values in metrics] for name in metrics[0]}
