"""Cross-entropy of classes over weighted examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.classification import Classification
from experiments.objectives.objective import Work

LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [np.nan, 0.0, 0.0]], np.float32)
LABELS = np.array([0, 2, 1], np.int32)
WEIGHTS = np.array([1.0, 3.0, 0.0], np.float32)


def nats(logits: np.ndarray, distribution: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    return float(np.sum(distribution * (np.log(np.sum(np.exp(logits))) - logits)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_the_weighted_mean_of_cross_entropies_to_smoothed_labels(smoothing, soft):
    distributions = np.eye(3)[LABELS]
    if soft:
        distributions[1] = [0.1, 0.3, 0.6]
    labels = distributions.astype(np.float32) if soft else LABELS
    batch: Any = {"image": LOGITS, "labels": labels, "weights": WEIGHTS}
    value, sums = Classification(smoothing)(jnp.asarray, batch, jax.random.key(0))

    smoothed = (1 - smoothing) * distributions + smoothing / 3
    expected = nats(LOGITS[0], smoothed[0]) + 3 * nats(LOGITS[1], smoothed[1])
    assert float(value) == pytest.approx(expected / 4, rel=1e-6)
    metrics = Classification().metrics({name: float(total) for name, total in sums.items()})
    # The first is right, and weighs 1 of 4.
    assert metrics == pytest.approx({"loss": expected / 4, "accuracy": 0.25}, rel=1e-6)


def test_a_row_of_weight_zero_has_a_gradient_of_zero():
    batch: Any = {"tokens": LOGITS, "labels": LABELS, "weights": WEIGHTS}

    def loss(shift: jax.Array) -> jax.Array:
        return Classification()(lambda x: x + shift[:, None], batch, jax.random.key(0))[0]

    assert np.isfinite(jax.grad(loss)(jnp.zeros(3))).all()


def test_a_model_that_reads_its_batch_is_told_which_rows_there_are():
    class Model:
        reads_batch = True

        def __call__(self, tokens: Any, there_B: Any) -> Any:
            return jnp.where(there_B[:, None], jnp.asarray([[1.0, 0.0, 0.0]]), jnp.nan)

    batch: Any = {"tokens": LOGITS, "labels": LABELS, "weights": WEIGHTS}
    _, sums = Classification()(Model(), batch, jax.random.key(0))
    assert sums["correct_sum"] == 1 and np.isfinite(sums["loss_sum"])


def test_images_and_tokens_are_counted_and_inputs_reach_the_model():
    image: Any = {"image": np.zeros((2, 4, 4, 3)), "labels": LABELS}
    tokens: Any = {"tokens": np.zeros((2, 5)), "mask": np.ones((2, 5), bool)}
    assert Classification().work(image) == Work("images", 2)
    assert Classification().work(tokens) == Work("tokens", 10, places=10, length=5)
    with pytest.raises(ValueError, match="must have 'tokens'; got labels"):
        Classification().work({"labels": LABELS})

    def model(tokens: Any, mask: Any) -> Any:
        return jnp.where(mask[:, :2], tokens[:, :2], 1.0)

    full = tokens | {"labels": LABELS[:2] % 2, "weights": WEIGHTS[:2]}
    assert float(Classification()(model, full, jax.random.key(0))[0]) == pytest.approx(np.log(2))
