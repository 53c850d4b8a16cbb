"""The velocity from images to noise along straight lines.

Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified
Flow", ICLR 2023, arXiv 2209.03003; Lipman et al., "Flow Matching for Generative Modeling", ICLR
2023, arXiv 2210.02747. Times drawn from a logit-normal: Esser et al., ICML 2024, arXiv 2403.03206.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.denoising import (
    images_of,
    mean_over_pixels,
    of_counted,
    of_each,
    some_classes,
)
from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

TIMES = ("uniform", "logit_normal")


@dataclass(frozen=True)
class FlowMatching:
    """E |e - x - v(x_t, t, class)|^2, a mean over pixels, with x_t = (1 - t) x + t e, e ~ N(0, 1).

    classes           number of classes; index `classes` stands for none
    times             how t is drawn: "uniform" in [0, 1), or "logit_normal": sigmoid(N(0, 1))
    class_dropout     the share of images whose class the model is not told

    Batch and model as of `NoisePrediction`; the model is told 1000 t.
    Sums over images: loss_sum, weight_sum. Metrics: loss, and mse, which is the same."""

    classes: int
    times: str = "uniform"
    class_dropout: float = 0.1

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        image = array_of(batch, "image", "FlowMatching").astype(jnp.float32)
        time_B, noise, class_B = self.drawn(batch, key)
        output = model(*self.noisy(image, noise, time_B), class_B)
        return self.scored(batch, noise, time_B, output)

    def scored(
        self, batch: Batch, noise: jax.Array, time_B: jax.Array, output: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The scalar and the sums of what a model says."""
        del time_B
        weights_B = batch["weights"].astype(jnp.float32)
        target = self.target(batch["image"].astype(jnp.float32), noise)
        square_B = mean_over_pixels(jnp.square(target - self.halves(output)[0]))
        sums = {"loss_sum": of_counted(weights_B, square_B), "weight_sum": jnp.sum(weights_B)}
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def drawn(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Times [B], noise like the images and classes [B] of a training step."""
        of_times, of_noise, of_classes = jax.random.split(key, 3)
        shape = batch["labels"].shape
        if self.times == "uniform":
            time_B = jax.random.uniform(of_times, shape)
        else:
            time_B = jax.nn.sigmoid(jax.random.normal(of_times, shape))
        noise = jax.random.normal(of_noise, batch["image"].shape)
        class_B = some_classes(of_classes, batch["labels"], self.class_dropout, self.classes)
        return time_B, noise, class_B

    def noisy(
        self, image: jax.Array, noise: jax.Array, time_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x_t, and the times [B] that the model is told."""
        time = of_each(time_B, image)
        return (1 - time) * image + time * noise, 1000 * time_B

    def said(
        self, model: Any, image: jax.Array, noise: jax.Array, place_B: jax.Array, class_B: jax.Array
    ) -> jax.Array:
        """As `Denoiser`; the place is t."""
        return self.halves(model(*self.noisy(image, noise, place_B), class_B))[0]

    def target(self, image: jax.Array, noise: jax.Array) -> jax.Array:
        """The velocity."""
        return noise - image

    def halves(self, output: jax.Array) -> tuple[jax.Array, None]:
        """The velocity in what a model says, which says nothing else."""
        return output.astype(jnp.float32), None

    def work(self, batch: Batch) -> Work:
        return images_of(batch, "FlowMatching")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = float(sums["loss_sum"] / sums["weight_sum"])
        return {"loss": loss, "mse": loss}
