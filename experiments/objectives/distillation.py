"""What a model of noisy images learns from a teacher that stays as it is.

LiT (ICCV 2025): L + 0.5 |e_T - e_S|^2 + 0.05 |V_T - V_S|^2. LinFusion (Liu et al., 2024, arXiv
2409.02097) and CLEAR (Liu et al., NeurIPS 2025, arXiv 2412.16112), with velocities, have the first
of the two, and 0.5 for the layers: LinFusion for what their attention returns, CLEAR for what its
output map reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.denoising import images_of, mean_over_pixels, of_counted
from experiments.objectives.flow_matching import FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction
from experiments.objectives.objective import Batch, Sums, Work, array_of, weighted_mean

FEATURES = ("outputs", "attention")


@dataclass(frozen=True)
class Distillation:
    """The objective, plus the weighted squared differences to what `model.teacher` says of the same
    noisy images, times and classes; means over pixels, and the teacher has no gradient.

    objective         of noisy images
    output_weight     of the difference of noise, or velocity
    variance_weight   of the difference of v, by which NoisePrediction says a variance
    feature_weight    of the difference of the layers' features, a mean over tokens, channels and
                      layers; the student's own activations feed its later layers
    features          what they are: "outputs" of the mixers, or "attention", what the output maps
                      of mixers read

    Sums over images: those of the objective; output_sum, variance_sum and feature_sum, of the
    differences.
    Metrics: those of the objective, loss being all of it; distil_output, distil_variance,
    distil_features."""

    objective: NoisePrediction | FlowMatching
    output_weight: float
    variance_weight: float = 0.0
    feature_weight: float = 0.0
    features: str = "outputs"

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        if model.teacher is None:
            raise ValueError(
                "config.model.teacher must be the section of a model for distil_output,"
                " distil_variance or distil_features; there is none"
            )
        image = array_of(batch, "image", "Distillation").astype(jnp.float32)
        weights_B = batch["weights"].astype(jnp.float32)
        place_B, noise, class_B = self.objective.drawn(batch, key)
        noisy = self.objective.noisy(image, noise, place_B)
        seen = (*noisy, class_B, self.features)
        output, features = model.with_outputs(*seen)
        taught, features_there = jax.lax.stop_gradient(model.teacher.with_outputs(*seen))
        if self.feature_weight and features.shape != features_there.shape:
            raise ValueError(
                "config.model.teacher must have the depth, width and patch of the model for"
                f" distil_features; mixers return {features_there.shape} there, {features.shape}"
                " here"
            )
        _, sums = self.objective.scored(batch, noise, place_B, output)
        (own, v), (there, v_there) = (self.objective.halves(said) for said in (output, taught))
        differences = {"output_sum": (self.output_weight, own - there)}
        if v is not None and v_there is not None:
            differences["variance_sum"] = (self.variance_weight, v - v_there)
        if self.feature_weight:
            apart = features.astype(jnp.float32) - features_there.astype(jnp.float32)
            differences["feature_sum"] = (self.feature_weight, jnp.moveaxis(apart, 1, 0))
        for name, (weight, apart) in differences.items():
            sums[name] = of_counted(weights_B, mean_over_pixels(jnp.square(apart)))
            sums["loss_sum"] = sums["loss_sum"] + weight * sums[name]
        return weighted_mean(sums["loss_sum"], sums["weight_sum"]), sums

    def work(self, batch: Batch) -> Work:
        return images_of(batch, "Distillation")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = {
            "output_sum": "distil_output",
            "variance_sum": "distil_variance",
            "feature_sum": "distil_features",
        }
        return self.objective.metrics(sums) | {
            metric: float(sums[name] / sums["weight_sum"])
            for name, metric in names.items()
            if name in sums
        }
