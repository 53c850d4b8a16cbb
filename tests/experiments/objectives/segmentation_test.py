"""Cross-entropy of voxels, and the mean over classes of how well their regions are covered."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.objective import Work
from experiments.objectives.segmentation import Segmentation

LABELS = np.array([[0, 1, 1, 2], [0, 0, 1, 1]], np.int32)
PREDICTED = np.array([[0, 1, 0, 3], [1, 0, 1, 3]], np.int32)
WEIGHTS = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.float32)
BATCH: Any = {"voxels": 2.0 * np.eye(5)[PREDICTED], "labels": LABELS, "weights": WEIGHTS}


def test_metrics_are_those_of_regions_of_all_voxels_together() -> None:
    objective = Segmentation(5)
    parts = [
        objective(jnp.asarray, {k: v[row : row + 1] for k, v in BATCH.items()}, jax.random.key(0))
        for row in range(2)
    ]
    sums = {name: float(parts[0][1][name] + parts[1][1][name]) for name in parts[0][1]}
    metrics = objective.metrics(sums)
    # Of 6 voxels that count 3 are right. Class 0: 2 of 4; 1: 1 of 3; 2: 0 of 1; 3: 0 of 1; 4 none.
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert metrics["mean_iou"] == pytest.approx((2 / 4 + 1 / 3) / 4)
    rest = np.log(np.exp(2) + 4)
    assert metrics["loss"] == pytest.approx((3 * (rest - 2) + 3 * rest) / 6, rel=1e-6)
    value, _ = objective(jnp.asarray, BATCH, jax.random.key(0))
    assert float(value) == pytest.approx(metrics["loss"], rel=1e-6)


def test_what_weighs_nothing_has_no_gradient_and_work_is_in_voxels() -> None:
    voxels = np.where(WEIGHTS[..., None] > 0, BATCH["voxels"], np.nan)

    def loss(shift: jax.Array) -> jax.Array:
        batch = BATCH | {"voxels": jnp.asarray(voxels) + shift[..., None]}
        return Segmentation(5)(lambda x: x, batch, jax.random.key(0))[0]

    assert np.isfinite(jax.grad(loss)(jnp.zeros((2, 4)))).all()
    assert Segmentation(5).work(BATCH) == Work("voxels", 8)
