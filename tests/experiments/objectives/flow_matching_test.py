"""Velocities along straight lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.flow_matching import FlowMatching

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.standard_normal((4, 2, 2, 1)).astype(np.float32),
    "labels": np.arange(4),
    "weights": np.array([1, 3, 1, 0], np.float32),
}


def test_the_loss_is_the_squared_error_of_the_velocity():
    objective = FlowMatching(classes=4)
    told = []

    def model(noisy, time, label):
        told[:] = noisy, time, label
        return 0.3 * noisy + label[:, None, None, None]

    loss, sums = objective(model, BATCH, jax.random.key(1))
    time_B, noise, class_B = objective.drawn(BATCH, jax.random.key(1))
    t = np.asarray(time_B)[:, None, None, None]
    noisy = (1 - t) * BATCH["image"] + t * noise
    np.testing.assert_allclose(told[0], noisy, rtol=1e-6)
    np.testing.assert_allclose(told[1], 1000 * time_B, rtol=1e-6)
    velocity = 0.3 * noisy + np.asarray(class_B)[:, None, None, None]
    error = np.square(noise - BATCH["image"] - velocity).mean(axis=(1, 2, 3))
    assert float(loss) == pytest.approx(np.average(error, weights=BATCH["weights"]), rel=1e-5)
    assert objective.metrics(sums) == {
        "loss": pytest.approx(float(loss)),
        "mse": pytest.approx(float(loss)),
    }
    assert objective.work(BATCH).count == 4


@pytest.mark.parametrize(("times", "deviation"), [("uniform", 0.2887), ("logit_normal", 0.2083)])
def test_times_are_drawn_as_the_option_says(times, deviation):
    batch = {"image": np.zeros((4000, 1, 1, 1)), "labels": np.zeros(4000, int)}
    time_B, _, _ = FlowMatching(4, times).drawn(batch, jax.random.key(0))
    assert float(jnp.mean(time_B)) == pytest.approx(0.5, abs=0.02)
    assert float(jnp.std(time_B)) == pytest.approx(deviation, abs=0.01)
