"""Cross-entropy of classes: of an image, of a sequence, of each cloud that is packed in a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

# What a batch may tell the model besides its image or its tokens.
MODEL_INPUTS = ("mask", "positions", "segment_ids", "coordinates")
# What is classified, by the name of its array.
EXAMPLES = ("image", "voxels", "tokens")


@dataclass(frozen=True)
class Classification:
    """Cross-entropy in nats per label, to labels that are smoothed: (1 - a) label + a / classes
    with a = label_smoothing (Szegedy et al., CVPR 2016, arXiv 1512.00567).

    An evaluation wants a = 0 and so has an objective of its own: `Sums(examples,
    Classification())`.

    Batch: image [B, height, width, channels], tokens [B, T, ...] or voxels [B, T, F]; labels, int
    [B] or, of mixed examples, float [B, classes] with the sum 1; weights float [B]; optional inputs
    of the model by name, MODEL_INPUTS. The model returns logits [B, classes] alone. Labels and
    weights [B, N], and logits [B, N, classes], of rows with N labels each. Voxels are counted with
    the places of a row that have none.
    Sums over labels: loss_sum, weight_sum, correct_sum; a prediction is correct where the largest
    logit is that of the (largest) label.
    Metrics: loss, accuracy."""

    label_smoothing: float = 0.0

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        labels, weights = batch["labels"], batch["weights"].astype(jnp.float32)
        logits = weighted_logits(model, batch)
        if labels.ndim == weights.ndim:
            labels = jax.nn.one_hot(labels, logits.shape[-1])
        smooth = optax.smooth_labels(labels.astype(jnp.float32), self.label_smoothing)
        loss_sum = jnp.sum(weights * optax.softmax_cross_entropy(logits, smooth))
        correct = jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1)
        sums = {
            "loss_sum": loss_sum,
            "weight_sum": jnp.sum(weights),
            "correct_sum": jnp.sum(weights * correct.astype(jnp.float32)),
        }
        return weighted_mean(loss_sum, sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        name = example_name(batch)
        example = array_of(batch, name, "Classification")
        if name == "image":
            return Work(unit="images", count=example.shape[0])
        places = example.shape[0] * example.shape[1]
        if name == "voxels":
            return Work(unit="voxels", count=places)
        return Work(unit="tokens", count=places, places=places, length=example.shape[1])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "loss": float(sums["loss_sum"] / sums["weight_sum"]),
            "accuracy": float(sums["correct_sum"] / sums["weight_sum"]),
        }


def weighted_logits(model: Any, batch: Batch) -> jax.Array:
    """The model's logits of a batch as `Classification` has it, float32; zeros of what weighs
    nothing."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if getattr(model, "reads_batch", False):
        inputs["there_B"] = batch["weights"] > 0
    example = array_of(batch, example_name(batch), "Classification")
    logits = model(example, **inputs).astype(jnp.float32)
    # A choice, not a product with zero: what the model says of what does not count is to reach
    # neither the loss nor its gradient.
    return jnp.where(batch["weights"][..., None] > 0, logits, 0.0)


def example_name(batch: Batch) -> str:
    """The array of a batch that is classified."""
    return next((name for name in EXAMPLES if name in batch), "tokens")
