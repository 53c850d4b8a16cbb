"""Squared error over weighted prompts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.objectives.objective import Work
from experiments.objectives.squared_error import SquaredError


def test_squared_error_loss_is_the_mean_over_weighted_prompts() -> None:
    prompts: Any = {
        "examples": np.array([1.0, 2.0, np.nan], np.float32),
        "target": np.array([3.0, 2.0, 0.0], np.float32),
        "weights": np.array([1.0, 1.0, 0.0], np.float32),
    }
    loss, sums = SquaredError()(lambda examples: jnp.asarray(examples), prompts, jax.random.key(0))
    assert float(loss) == 2
    assert {name: float(value) for name, value in sums.items()} == {
        "loss_sum": 4,
        "weight_sum": 2,
        "target_square_sum": 13,
    }


def test_the_work_of_a_batch_is_the_examples_of_its_prompts() -> None:
    batch = {"examples": np.zeros((2, 6, 4)), "target": np.zeros(2)}
    assert SquaredError().work(batch) == Work("examples", 12, places=12, length=6)
