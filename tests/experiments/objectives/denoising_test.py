"""The error on noise that is the same for all models."""

import jax
import numpy as np
import pytest

from experiments.objectives.denoising import DenoisingGrid
from experiments.objectives.flow_matching import FlowMatching
from experiments.objectives.noise_prediction import NoisePrediction

BATCH = {
    "image": np.random.default_rng(0).uniform(-1, 1, (6, 2, 2, 1)).astype(np.float32),
    "labels": np.arange(6) % 2,
    "number": np.array([4, 0, 11, 7, 5, 6], np.int32),
    "weights": np.ones(6, np.float32),
}


def model(noisy, time, label):
    return 0.5 * noisy


@pytest.mark.parametrize("objective", [NoisePrediction(2, learned_variance=False), FlowMatching(2)])
def test_the_noise_follows_from_the_image_and_not_from_batch_or_key(objective):
    grid = DenoisingGrid(objective, times=3)
    score = jax.jit(lambda batch, key: grid(model, batch, key)[1]["loss_sum"])
    whole = float(score(BATCH, jax.random.key(0)))
    order = np.array([3, 1, 5, 0, 2, 4])
    parts = [{name: a[order[i : i + 3]] for name, a in BATCH.items()} for i in (0, 3)]
    assert sum(float(score(part, jax.random.key(9))) for part in parts) == pytest.approx(
        whole, rel=1e-6
    )
    assert grid.metrics({"loss_sum": whole, "weight_sum": 6.0}) == {"mse": whole / 6}
    changed = {**BATCH, "number": BATCH["number"] + 1}
    assert float(score(changed, jax.random.key(0))) != pytest.approx(whole, rel=1e-4)


def test_what_is_known_of_the_noise_is_its_error():
    """The error of the guess 0 is the mean square of what was to be guessed: 1, of the noise."""
    batch = {name: np.repeat(a, 50, axis=0) for name, a in BATCH.items()}
    batch["number"] = np.arange(300, dtype=np.int32)
    grid = DenoisingGrid(NoisePrediction(2, learned_variance=False), times=5)
    _, sums = jax.jit(lambda: grid(lambda x, *_: 0 * x, batch, None))()
    assert grid.metrics(sums)["mse"] == pytest.approx(1, abs=0.05)


class Half:
    def __init__(self, share):
        self.teacher = lambda noisy, time, label: share * noisy

    __call__ = staticmethod(model)


def test_a_teacher_is_compared_on_the_same_noise():
    grid = DenoisingGrid(FlowMatching(2), times=3)

    @jax.jit
    def scores():
        return [grid(m, BATCH, None)[1] for m in (model, Half(0.0), Half(0.2), Half(0.5))]

    alone, *taught = map(grid.metrics, scores())
    assert set(alone) == {"mse"}
    # To rounding: the compiler fuses the four differently.
    assert [each["mse"] for each in taught] == pytest.approx([alone["mse"]] * 3, rel=1e-6)
    apart = [each["to_teacher"] for each in taught]
    assert apart[1] == pytest.approx(0.36 * apart[0], rel=1e-5)
    assert apart[2] == 0.0
