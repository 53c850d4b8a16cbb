"""What objectives of noisy images share, and their error on noise that all models see alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

SEED = 0  # of the noise of evaluations


class Denoiser(Protocol):
    """An objective of noisy images."""

    def said(
        self, model: Any, image: jax.Array, noise: jax.Array, place_B: jax.Array, class_B: jax.Array
    ) -> jax.Array:
        """What the model says of each image with its noise, float32; place_B in [0, 1): when, from
        no noise to noise alone."""
        ...

    def target(self, image: jax.Array, noise: jax.Array) -> jax.Array:
        """What it was to say."""
        ...


def some_classes(key: jax.Array, class_B: jax.Array, dropout: float, none: int) -> jax.Array:
    """The classes, each replaced by `none` with probability `dropout` (Ho and Salimans, 2022, arXiv
    2207.12598)."""
    return jnp.where(jax.random.bernoulli(key, dropout, class_B.shape), none, class_B)


def of_each(values_B: jax.Array, image: jax.Array) -> jax.Array:
    """Values [B, 1, ...] to be multiplied with images or videos [B, ...]."""
    return values_B.reshape(-1, *(1,) * (image.ndim - 1))


def mean_over_pixels(values: jax.Array) -> jax.Array:
    """[B, ...] -> [B], float32."""
    return jnp.mean(values.astype(jnp.float32), axis=tuple(range(1, values.ndim)))


def of_counted(weights_B: jax.Array, values_B: jax.Array) -> jax.Array:
    """sum_B weight value, where a row of weight 0 does not count whatever its value is."""
    return jnp.sum(jnp.where(weights_B > 0, weights_B * values_B, 0.0))


def images_of(batch: Batch, objective: str) -> Work:
    """The work of a batch of images."""
    return Work(unit="images", count=array_of(batch, "image", objective).shape[0])


@dataclass(frozen=True)
class DenoisingGrid:
    """The error of an objective at fixed times, with noise that follows from an image's number: the
    same for every model, batch and step of training, so that two models are compared in pairs.

    objective       of noisy images
    times           evenly spread over the time from no noise to noise alone

    Batch: image [B, Y, X, C]; labels int [B]; number int [B]; weights float [B].
    Sums over images: loss_sum, weight_sum; of a model with a teacher apart_sum. Metrics: mse;
    to_teacher, the same of the difference to what the teacher says."""

    objective: Any
    times: int = 10

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        del key
        image, class_B = array_of(batch, "image", "DenoisingGrid"), batch["labels"]
        weights_B = batch["weights"].astype(jnp.float32)

        def noise(number: jax.Array, time: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), time)
            return jax.random.normal(own, image.shape[1:])

        def errors(time: jax.Array) -> jax.Array:
            place_B = jnp.full(len(image), (time + 0.5) / self.times)
            noise_B = jax.vmap(noise, in_axes=(0, None))(batch["number"], time)
            said, *taught = (
                self.objective.said(each, image, noise_B, place_B, class_B) for each in models
            )
            others = (self.objective.target(image.astype(jnp.float32), noise_B), *taught)
            return jnp.stack([mean_over_pixels(jnp.square(other - said)) for other in others])

        teacher = getattr(model, "teacher", None)
        models = (model,) if teacher is None else (model, teacher)
        errors_EB = jnp.mean(jax.lax.map(errors, jnp.arange(self.times)), axis=0)
        loss_sum, *apart = (of_counted(weights_B, error_B) for error_B in errors_EB)
        sums = {"loss_sum": loss_sum, "weight_sum": jnp.sum(weights_B)}
        if apart:
            sums["apart_sum"] = apart[0]
        return weighted_mean(loss_sum, sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        return images_of(batch, "DenoisingGrid")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {"loss_sum": "mse", "apart_sum": "to_teacher"}
        return {
            metric: float(sums[name] / sums["weight_sum"])
            for name, metric in names.items()
            if name in sums
        }
