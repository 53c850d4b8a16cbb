"""Cross-entropy of weighted targets, its sums, and the work of a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.next_token import NextToken, asks_for_next_tokens, token_metrics
from experiments.objectives.objective import Work

KEY = jax.random.key(0)


def test_next_token_loss_is_the_mean_log_loss_of_the_weighted_targets() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (3, 5))
    # The first sequence has 1.5 of 2.5 right, the second no weight at all, the third what is asked
    # right and no more.
    weights = np.array([[1, 0, 0.5, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], np.float32)
    targets[0, [0, 2]] = logits[0, [0, 2]].argmax(axis=-1)
    targets[0, 3] = logits[0, 3].argmin()
    targets[2] = logits[2].argmin(axis=-1)
    targets[2, 1] = logits[2, 1].argmax()
    logits[1] = np.nan  # a sequence without weight must not reach the loss
    jitted = jax.jit(functools.partial(NextToken(), lambda tokens: (jnp.asarray(logits), None)))
    loss, sums = jitted({"tokens": targets, "targets": targets, "weights": weights}, KEY)
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    expected = -sum(
        weights[b, t] * log_probs[b, t, targets[b, t]] for b in (0, 2) for t in range(5)
    )
    assert float(loss) == pytest.approx(expected / 3.5, rel=1e-6)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            "loss_sum": expected,
            "weight_sum": 3.5,
            "correct_sum": 2.5,
            "sequence_correct_sum": 1,
            "sequence_sum": 2,
        },
        rel=1e-6,
    )
    metrics = token_metrics({name: float(value) for name, value in sums.items()})
    assert metrics["accuracy"] == pytest.approx(2.5 / 3.5)


def test_z_loss_adds_the_square_of_log_z_to_the_scalar_alone() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 7)).astype(np.float32)
    weights = np.array([[1, 0, 0.5], [0, 0, 0]], np.float32)
    batch = {
        "tokens": np.zeros((2, 3), int),
        "targets": rng.integers(0, 7, (2, 3)),
        "weights": weights,
    }

    def model(tokens: Any) -> Any:
        return jnp.asarray(logits), None

    plain, sums = NextToken()(model, batch, KEY)
    loss, same_sums = NextToken(z_loss=0.1)(model, batch, KEY)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    expected = 0.1 * (log_z[0, 0] ** 2 + 0.5 * log_z[0, 2] ** 2) / 1.5
    assert float(loss - plain) == pytest.approx(expected, rel=1e-5)
    assert jax.tree.map(float, sums) == jax.tree.map(float, same_sums)


def test_next_token_loss_passes_on_what_the_batch_tells_the_model() -> None:
    seen = {}

    def model(tokens: jax.Array, **inputs: jax.Array) -> tuple[jax.Array, None]:
        seen.update(inputs)
        return jnp.zeros((2, 3, 4)), None

    told = {
        name: np.zeros((2, 3), np.int32)
        for name in ("positions", "segment_ids", "readout_positions")
    }
    batch = {"tokens": np.zeros((2, 9), np.int32), "targets": np.zeros((2, 3), np.int32)} | told
    batch |= {"weights": np.ones((2, 3), np.float32), "bytes": np.array([3.0, 4.0], np.float32)}
    _, sums = jax.jit(functools.partial(NextToken(), model))(batch, KEY)
    assert set(seen) == set(told)
    assert float(sums["bytes_sum"]) == 7
    assert float(sums["sequence_correct_sum"]) == 2


def test_the_work_of_a_batch_is_its_tokens() -> None:
    batch = {"tokens": np.zeros((2, 9), np.int32), "targets": np.zeros((2, 3), np.int32)}
    assert NextToken().work(batch) == Work("tokens", 18, places=18, outputs=6, length=9)


def test_a_batch_without_tokens_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match="NextToken must have 'tokens'; got examples, target"):
        NextToken().work({"examples": np.zeros((2, 3, 4)), "target": np.zeros(2)})


def test_targets_that_are_all_the_following_tokens_are_known_as_such():
    tokens = np.array([[3, 1, 2, 5]])
    batch = {"tokens": tokens, "targets": np.array([[1, 9, 5, 0]])}
    asked = {"weights": np.array([[1.0, 0.0, 1.0, 1.0]])}
    assert asks_for_next_tokens(batch | asked)
    assert not asks_for_next_tokens(batch | {"weights": np.ones((1, 4))})
    assert not asks_for_next_tokens(batch | {"weights": np.array([[0.0, 0.0, 0.0, 1.0]])})
    assert not asks_for_next_tokens({"tokens": tokens, "targets": np.array([[1]])})


def test_a_model_with_a_teacher_learns_its_distribution() -> None:
    """The divergence is 0 from the teacher itself, and its gradient does not reach it."""
    rng = np.random.default_rng(0)
    own, there = (jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) for _ in range(2))
    batch = {"tokens": np.zeros((2, 3), int), "targets": np.zeros((2, 3), int)}
    batch["weights"] = np.array([[1, 0.5, 0], [0, 1, 1]], np.float32)

    class Taught:
        def __init__(self, own: jax.Array, there: jax.Array | None):
            self.logits, self.teacher = own, None if there is None else Taught(there, None)

        def __call__(self, tokens: Any) -> tuple[jax.Array, None]:
            return self.logits, None

    def divergence(own: jax.Array, there: jax.Array) -> Any:
        return NextToken()(Taught(own, there), batch, KEY)

    (value, sums), gradient = jax.value_and_grad(divergence, argnums=(0, 1), has_aux=True)(
        own, there
    )
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in np.asarray([there, own]))
    expected = (batch["weights"] * (p * np.log(p / q)).sum(-1)).sum()
    assert float(value) == pytest.approx(expected / 3.5, rel=1e-5)
    assert float(sums["divergence_reported"]) == pytest.approx(expected, rel=1e-5)
    expected = batch["weights"][..., None] * (q - p) / 3.5
    np.testing.assert_allclose(gradient[0], expected, atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    assert float(divergence(there, there)[0]) == pytest.approx(0, abs=1e-7)
