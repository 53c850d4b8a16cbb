"""The noise in noisy images, and the variance of the step before, as DiT learns them.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv 2006.11239; the
variance: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, arXiv
2102.09672."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from experiments.objectives.denoising import (
    images_of,
    mean_over_pixels,
    of_counted,
    of_each,
    some_classes,
)
from experiments.objectives.noise_schedules import Chain, chain
from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

LEVELS = 256  # of a pixel, in [-1, 1]


@dataclass(frozen=True)
class NoisePrediction:
    """E |e - e(x_t, t, class)|^2, a mean over pixels; with learned_variance, plus the variational
    bound (Nichol and Dhariwal, Eq. 16).

        log variance = f log(beta_t) + (1 - f) log(posterior_t),   f = (v + 1) / 2       (Eq. 15)
        bound_t = KL(step before, given x || model's), of the first step -log p(x), in bits

    v are the second half of the model's channels. The bound moves v alone: its mean is that of a
    stopped e. Its weight is 0.001 for the sum over all steps, and so steps / 1000 for one of them.

    classes           number of classes; index `classes` stands for none
    schedule, steps   as experiments/objectives/noise_schedules.py
    class_dropout     the share of images whose class the model is not told

    Batch: image [B, Y, X, C] in [-1, 1]; labels int [B]; weights float [B]. The model is called as
    model(noisy image, time [B] in 0..1000, class [B]).
    Sums over images: loss_sum, weight_sum, square_sum; with learned_variance bound_sum.
    Metrics: loss; mse, of the noise; with learned_variance bound, the bits of a step and number."""

    classes: int
    schedule: str = "linear"
    steps: int = 1000
    learned_variance: bool = True
    class_dropout: float = 0.1

    @property
    def chain(self) -> Chain:
        return chain(self.schedule, self.steps)

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        image = array_of(batch, "image", "NoisePrediction").astype(jnp.float32)
        step_B, noise, class_B = self.drawn(batch, key)
        output = model(*self.noisy(image, noise, step_B), class_B)
        return self.scored(batch, noise, step_B, output)

    def scored(
        self, batch: Batch, noise: jax.Array, step_B: jax.Array, output: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The scalar and the sums of what a model says."""
        image = batch["image"].astype(jnp.float32)
        weights_B = batch["weights"].astype(jnp.float32)
        predicted, v = self.halves(output)
        square_B = mean_over_pixels(jnp.square(predicted - noise))
        sums = {"weight_sum": jnp.sum(weights_B), "square_sum": of_counted(weights_B, square_B)}
        loss_sum = sums["square_sum"]
        if v is not None:
            bound_B = self.bound(image, noise, step_B, jax.lax.stop_gradient(predicted), v)
            sums["bound_sum"] = of_counted(weights_B, bound_B)
            loss_sum = loss_sum + self.steps / 1000 * sums["bound_sum"]
        sums["loss_sum"] = loss_sum
        return weighted_mean(loss_sum, sums["weight_sum"]), sums

    def drawn(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Steps int [B], noise like the images and classes [B] of a training step."""
        of_steps, of_noise, of_classes = jax.random.split(key, 3)
        step_B = jax.random.randint(of_steps, batch["labels"].shape, 0, self.steps)
        noise = jax.random.normal(of_noise, batch["image"].shape)
        class_B = some_classes(of_classes, batch["labels"], self.class_dropout, self.classes)
        return step_B, noise, class_B

    def noisy(
        self, image: jax.Array, noise: jax.Array, step_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x_t, and the times [B] that the model is told."""
        at = self._at(step_B, image)
        return at.signal * image + at.noise * noise, at.time.reshape(-1)

    def halves(self, output: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The noise and v, or None, in what a model says."""
        output = output.astype(jnp.float32)
        if not self.learned_variance:
            return output, None
        predicted, v = jnp.split(output, 2, axis=-1)
        return predicted, v

    def said(
        self, model: Any, image: jax.Array, noise: jax.Array, place_B: jax.Array, class_B: jax.Array
    ) -> jax.Array:
        """As `Denoiser`."""
        step_B = jnp.floor(place_B * self.steps).astype(jnp.int32)
        return self.halves(model(*self.noisy(image, noise, step_B), class_B))[0]

    def target(self, image: jax.Array, noise: jax.Array) -> jax.Array:
        """The noise."""
        del image
        return noise

    def bound(
        self,
        image: jax.Array,
        noise: jax.Array,
        step_B: jax.Array,
        predicted: jax.Array,
        v: jax.Array,
    ) -> jax.Array:
        """The term of a step in the variational bound, bits per number, [B]."""
        at = self._at(step_B, image)
        log_variance = log_variance_of(at, v)
        # Both means have x_t in common, and x is (x_t - noise e) / signal.
        apart = at.of_image * at.noise / at.signal * (predicted - noise)
        ratio = at.log_posterior - log_variance
        divergence = 0.5 * (jnp.exp(ratio) - 1 - ratio + jnp.square(apart) * jnp.exp(-log_variance))
        first = -log_probability_of_level(image, image - apart, 0.5 * log_variance)
        nats = jnp.where(of_each(step_B == 0, image), first, divergence)
        return mean_over_pixels(nats) / math.log(2)

    def _at(self, step_B: jax.Array, image: jax.Array) -> Chain:
        """The numbers of each image's step, [B, 1, ...]."""
        return Chain(*(of_each(jnp.asarray(a)[step_B], image) for a in self.chain))

    def work(self, batch: Batch) -> Work:
        return images_of(batch, "NoisePrediction")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        weight = sums["weight_sum"]
        values = {
            "loss": float(sums["loss_sum"] / weight),
            "mse": float(sums["square_sum"] / weight),
        }
        if self.learned_variance:
            values["bound"] = float(sums["bound_sum"] / weight)
        return values


def log_variance_of(at: Chain, v: jax.Array) -> jax.Array:
    """log variance of the step before that a model with output v says."""
    share = (v + 1) / 2
    return share * at.log_beta + (1 - share) * at.log_posterior


def log_probability_of_level(x: jax.Array, mean: jax.Array, log_deviation: jax.Array) -> jax.Array:
    """log of what N(mean, deviation^2) has in the 1/256 of [-1, 1] around x; the first and the last
    one go to infinity (DDPM, Eq. 13). Of tails, too: the log of a difference is taken as that of
    logs, on the side where they are small."""
    half = 1 / (LEVELS - 1)
    scale = jnp.exp(-log_deviation)
    low, high = (x - half - mean) * scale, (x + half - mean) * scale
    above = low > 0
    low, high = jnp.where(above, -high, low), jnp.where(above, -low, high)
    between = log_ndtr(high) + jnp.log(-jnp.expm1(log_ndtr(low) - log_ndtr(high)))
    below_first = log_ndtr((x + half - mean) * scale)
    above_last = log_ndtr(-(x - half - mean) * scale)
    inside = jnp.where(x > 0.999, above_last, between)
    return jnp.where(x < -0.999, below_first, inside)
