"""Cross-entropy of the class of every voxel, and how well regions of classes are covered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.classification import Classification, weighted_logits
from experiments.objectives.objective import Batch, Sums, Work, weighted_mean

REGIONS = ("labelled", "predicted", "both")


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy in nats per voxel.

    Batch: as of `Classification`, with labels int [B, T] and weights [B, T].
    Sums: those of `Classification`, and for each class c labelled_<c>, predicted_<c> and both_<c>,
    the weights of the voxels whose label, whose largest logit, or whose both it is.
    Metrics: loss, accuracy, and mean_iou: the mean over classes of both / (labelled + predicted -
    both), over all voxels together, without classes that are neither labelled nor predicted."""

    classes: int
    cross_entropy: Classification = field(default_factory=Classification)

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        logits = weighted_logits(model, batch)
        weights, labels = batch["weights"].astype(jnp.float32), batch["labels"]
        # The model is called once: its logits are all that the cross-entropy sees of it.
        _, sums = self.cross_entropy(lambda *_, **__: logits, batch, key)
        label = jax.nn.one_hot(labels, self.classes) * weights[..., None]
        predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), self.classes) * weights[..., None]
        both = jnp.where(predicted > 0, label, 0.0)
        for name, region in zip(REGIONS, (label, predicted, both), strict=True):
            of_class = jnp.sum(region, axis=tuple(range(region.ndim - 1)))
            sums |= {f"{name}_{number}": of_class[number] for number in range(self.classes)}
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        return self.cross_entropy.work(batch)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        shares = []
        for number in range(self.classes):
            labelled, predicted, both = (float(sums[f"{name}_{number}"]) for name in REGIONS)
            if labelled + predicted > 0:
                shares.append(both / (labelled + predicted - both))
        mean_iou = sum(shares) / len(shares) if shares else float("nan")
        return {**self.cross_entropy.metrics(sums), "mean_iou": mean_iou}
