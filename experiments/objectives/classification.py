"""Cross-entropy of the class of a whole example: of an image, of a sequence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

# What a batch may tell the model besides its image or its tokens.
MODEL_INPUTS = ("mask", "positions", "segment_ids")


@dataclass(frozen=True)
class Classification:
    """Cross-entropy in nats per example, to labels that are smoothed: (1 - a) label + a / classes
    with a = label_smoothing (Szegedy et al., CVPR 2016, arXiv 1512.00567).

    An evaluation wants a = 0 and so has an objective of its own: `Sums(examples,
    Classification())`.

    Batch: image [B, height, width, channels] or tokens [B, T, ...]; labels, int [B] or, of mixed
    examples, float [B, classes] with the sum 1; weights float [B]; optional inputs of the model by
    name, MODEL_INPUTS. The model returns logits [B, classes] alone.
    Sums over examples: loss_sum, weight_sum, correct_sum; a prediction is correct where the largest
    logit is that of the (largest) label.
    Metrics: loss, accuracy."""

    label_smoothing: float = 0.0

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        labels, weights_B = batch["labels"], batch["weights"].astype(jnp.float32)
        # A choice, not a product with zero: what the model says of rows that do not count is to
        # reach neither the loss nor its gradient.
        logits_BC = jnp.where(
            weights_B[:, None] > 0, model(_example(batch), **inputs).astype(jnp.float32), 0.0
        )
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, logits_BC.shape[-1])
        smooth_BC = optax.smooth_labels(labels.astype(jnp.float32), self.label_smoothing)
        loss_B = optax.softmax_cross_entropy(logits_BC, smooth_BC)
        loss_sum = jnp.sum(weights_B * loss_B)
        correct_B = jnp.argmax(logits_BC, axis=-1) == jnp.argmax(labels, axis=-1)
        sums = {
            "loss_sum": loss_sum,
            "weight_sum": jnp.sum(weights_B),
            "correct_sum": jnp.sum(weights_B * correct_B.astype(jnp.float32)),
        }
        return weighted_mean(loss_sum, sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        example = _example(batch)
        if "image" in batch:
            return Work(unit="images", count=example.shape[0])
        places = example.shape[0] * example.shape[1]
        return Work(unit="tokens", count=places, places=places, length=example.shape[1])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "loss": float(sums["loss_sum"] / sums["weight_sum"]),
            "accuracy": float(sums["correct_sum"] / sums["weight_sum"]),
        }


def _example(batch: Batch) -> Any:
    return array_of(batch, "image" if "image" in batch else "tokens", "Classification")
