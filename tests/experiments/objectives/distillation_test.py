"""What is learned from a teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.distillation import Distillation
from experiments.objectives.flow_matching import FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.uniform(-1, 1, (4, 2, 2, 1)).astype(np.float32),
    "labels": np.arange(4),
    "weights": np.array([1, 2, 1, 0], np.float32),
}
NOISE, FLOW = NoisePrediction(4, steps=25), FlowMatching(4)


class Scaled:
    """A model that says its input times a number, on twice the channels for a variance."""

    def __init__(self, factor, channels: int, teacher: Any = None):
        self.factor, self.channels, self.teacher = factor, channels, teacher

    def __call__(self, image, time_B, class_B):
        return self.with_outputs(image, time_B, class_B)[0]

    def with_outputs(self, image, time_B, class_B, keeps="outputs"):
        said = jnp.concatenate([self.factor * image] * self.channels, axis=-1)
        features = self.factor * image.reshape(1, len(image), 4, 1)
        other = 2 if keeps == "outputs" else 3
        return said, jnp.concatenate((features, other * features))


@pytest.mark.parametrize(("objective", "channels"), [(NOISE, 2), (FLOW, 1)])
def test_a_teacher_that_is_the_student_adds_exactly_nothing(objective, channels):
    student = Scaled(0.7, channels, Scaled(0.7, channels))
    key = jax.random.key(0)
    loss, sums = Distillation(objective, 0.5, 0.05, 0.5)(student, BATCH, key)
    plain, _ = objective(student, BATCH, key)
    assert float(loss) == float(plain)
    assert float(sums["output_sum"]) == float(sums.get("variance_sum", 0.0)) == 0.0
    assert float(sums["feature_sum"]) == 0.0


def test_the_terms_are_weighted_means_of_squared_differences():
    student, key = Scaled(0.7, 2, Scaled(0.4, 2)), jax.random.key(0)
    distillation = Distillation(NOISE, 0.5, 0.05)
    loss, sums = distillation(student, BATCH, key)
    plain, _ = NOISE(student, BATCH, key)
    step_B, noise, _ = NOISE.drawn(BATCH, key)
    noisy, _ = NOISE.noisy(BATCH["image"], noise, step_B)
    apart = np.square(0.3 * np.asarray(noisy)).mean(axis=(1, 2, 3))
    mean = np.average(apart, weights=BATCH["weights"])
    metrics = distillation.metrics(sums)
    assert metrics["distil_output"] == pytest.approx(mean, rel=1e-5)
    assert metrics["distil_variance"] == pytest.approx(mean, rel=1e-5)
    assert float(loss) == pytest.approx(float(plain) + 0.55 * mean, rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    # Of two layers, one of which differs twice as much.
    more, sums = Distillation(NOISE, 0.5, 0.05, 0.4)(student, BATCH, key)
    assert float(more - loss) == pytest.approx(0.4 * 2.5 * mean, rel=1e-4)
    assert distillation.metrics(sums)["distil_features"] == pytest.approx(2.5 * mean, rel=1e-5)
    distillation = Distillation(NOISE, 0.0, 0.0, 0.5, "attention")
    sums = distillation(student, BATCH, key)[1]
    assert distillation.metrics(sums)["distil_features"] == pytest.approx(5 * mean, rel=1e-5)
    off, _ = Distillation(NOISE, 0.0, 0.0)(student, BATCH, key)
    assert float(off) == float(plain)


def test_the_teacher_has_no_gradient():
    def loss(own, of_teacher):
        model = Scaled(own, 1, Scaled(of_teacher, 1))
        return Distillation(FLOW, 1.0)(model, BATCH, jax.random.key(0))[0]

    own, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.7, 0.4)
    assert own != 0 and of_teacher == 0


def test_a_model_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match=r"config.model.teacher must be the section of a model"):
        Distillation(FLOW, 1.0)(Scaled(1.0, 1), BATCH, jax.random.key(0))
