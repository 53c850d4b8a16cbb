"""In-context regression: closed forms against published numbers and Monte Carlo, and the law of the
prompts."""

import math
from typing import Any

import numpy as np
import pytest

from experiments.tables.computations import icl_closed_form as closed
from experiments.training.task import Batch, find_task

DIMENSION, EXAMPLES = 5, 20
ISOTROPIC = np.eye(DIMENSION)
SPECTRUM = (0.25, 0.5, 1.0, 2.0, 4.0)
ANISOTROPIC = np.diag(SPECTRUM)
BACKWARDS = ANISOTROPIC[::-1, ::-1]


def draw(evaluation: str = "in_distribution", prompts: int = 20_000, **options: Any) -> Batch:
    task: Any = find_task("icl_regression", options)
    return task.evaluations[evaluation].fetch(np.arange(prompts))


def predict(batch: Batch, preconditioner: np.ndarray) -> np.ndarray:
    """x_q^T P h, h = (1/M) sum_i y_i x_i, in float64."""
    x, y = np.split(batch["examples"].astype(np.float64), [-1], axis=2)
    h = np.mean(x[:, :-1] * y[:, :-1], axis=1)
    return np.einsum("nd,de,ne->n", x[:, -1], preconditioner, h)


def assert_risk(batch: Batch, preconditioner: np.ndarray, expected: float) -> None:
    """The Monte Carlo risk is within three standard errors of `expected`."""
    errors = (predict(batch, preconditioner) - batch["target"]) ** 2
    assert abs(errors.mean() - expected) < 3 * errors.std() / math.sqrt(len(errors))


# Closed forms


@pytest.mark.parametrize(
    ("covariance", "examples", "noise", "published"),
    [
        (ISOTROPIC, 5, 0, 2.7273),
        (ISOTROPIC, 20, 0, 1.1538),
        (ISOTROPIC, 80, 0, 0.3488),
        (ISOTROPIC, 20, math.sqrt(0.5), 1.2264),
        (ANISOTROPIC, 5, 0, 3.7040),
        (ANISOTROPIC, 20, 0, 1.5884),
        (ANISOTROPIC, 80, 0, 0.5121),
    ],
)
def test_least_risks_are_the_published_ones(
    covariance: np.ndarray, examples: int, noise: float, published: float
) -> None:
    assert closed.optimal_risk(covariance, examples, noise) == pytest.approx(published, abs=6e-5)
    # The same number from the risk of the optimal preconditioner.
    best = closed.optimal_preconditioner(covariance, examples, noise)
    assert closed.risk(best, examples, covariance, noise=noise) == pytest.approx(
        published, abs=6e-5
    )


def test_risks_at_other_test_lengths_are_the_published_ones() -> None:
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES)
    for length, published in ((5, 5.058), (20, 1.588), (200, 0.548)):
        assert closed.risk(best, length, ANISOTROPIC) == pytest.approx(published, abs=6e-4)
    assert closed.length_floor(ANISOTROPIC, EXAMPLES) == pytest.approx(0.432, abs=6e-4)
    assert closed.risk(best, 10**9, ANISOTROPIC) == pytest.approx(
        closed.length_floor(ANISOTROPIC, EXAMPLES), rel=1e-6
    )


def test_risks_under_covariate_shift_are_the_published_ones() -> None:
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES)
    for scale, published in ((0.5, 0.652), (1, 0.205), (1.5, 1.447), (2, 7.360)):
        shifted = scale**2 * ANISOTROPIC
        assert closed.risk(best, EXAMPLES, shifted) / np.trace(shifted) == pytest.approx(
            published, abs=6e-4
        )
    assert closed.risk(best, EXAMPLES, BACKWARDS) == pytest.approx(134.5, abs=0.06)
    assert closed.risk(best, EXAMPLES, ANISOTROPIC, BACKWARDS) == pytest.approx(3.80, abs=6e-3)


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("task_covariance", [None, np.linalg.inv(ANISOTROPIC)])
def test_no_other_preconditioner_has_less_risk(
    noise: float, task_covariance: np.ndarray | None
) -> None:
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES, noise, task_covariance)
    least = closed.risk(best, EXAMPLES, ANISOTROPIC, noise=noise, task_covariance=task_covariance)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = best + 1e-3 * rng.normal(size=best.shape)
        assert (
            closed.risk(other, EXAMPLES, ANISOTROPIC, noise=noise, task_covariance=task_covariance)
            > least
        )
    if task_covariance is not None:
        # Whitened inputs: P* = N / (N + d + 1 + s^2) Lam^-1.
        share = EXAMPLES / (EXAMPLES + DIMENSION + 1 + noise**2)
        np.testing.assert_allclose(best, share * task_covariance, atol=1e-12)
        assert least == pytest.approx(DIMENSION * (1 - share))


def test_the_global_minimum_predicts_like_the_optimal_preconditioner() -> None:
    w_pv, w_kq = closed.global_minimum(ANISOTROPIC, EXAMPLES)
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES)
    np.testing.assert_allclose(w_pv[-1, -1] * w_kq[:-1, :-1], best, atol=1e-12)
    assert np.linalg.norm(w_pv) == pytest.approx(np.linalg.norm(w_kq)), "balanced"
    np.testing.assert_allclose(np.linalg.inv(best), closed.gamma(ANISOTROPIC, EXAMPLES), atol=1e-12)


def test_risks_have_their_limits() -> None:
    risks = [closed.optimal_risk(ANISOTROPIC, examples) for examples in (1, 10, 100, 10**9)]
    assert risks == sorted(risks, reverse=True)
    assert risks[-1] == pytest.approx(0, abs=1e-6)
    assert closed.optimal_risk(ANISOTROPIC, 1, noise=1e6) == pytest.approx(np.trace(ANISOTROPIC))
    assert closed.exponential_risk(DIMENSION, EXAMPLES) == pytest.approx(2.1429, abs=6e-5)
    assert closed.exponential_risk(DIMENSION, 10**9) == pytest.approx(DIMENSION / 3)
    assert [closed.least_squares_risk(DIMENSION, examples) for examples in (2, 5, 9)] == [3, 0, 0]


# Prompts


@pytest.mark.parametrize("noise", [0.0, math.sqrt(0.5)])
@pytest.mark.parametrize("spectrum", [(1.0,) * DIMENSION, SPECTRUM])
@pytest.mark.parametrize("length", [EXAMPLES, 8])
def test_risks_agree_with_monte_carlo(
    noise: float, spectrum: tuple[float, ...], length: int
) -> None:
    covariance = np.diag(spectrum)
    preconditioner = 0.9 * closed.optimal_preconditioner(covariance, EXAMPLES, noise)
    batch = draw(f"length_{length}", covariance=spectrum, noise=noise, test_lengths=(EXAMPLES, 8))
    assert batch["examples"].shape[1] == length + 1
    assert_risk(batch, preconditioner, closed.risk(preconditioner, length, covariance, noise=noise))


def test_shifted_risks_agree_with_monte_carlo() -> None:
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES)
    options: dict[str, Any] = {
        "covariance": SPECTRUM,
        "test_input_scales": (1.5,),
        "test_reversed": True,
    }
    assert_risk(
        draw("scale_1.5", **options), best, closed.risk(best, EXAMPLES, 1.5**2 * ANISOTROPIC)
    )
    assert_risk(draw("reversed", **options), best, closed.risk(best, EXAMPLES, BACKWARDS))
    assert_risk(
        draw("reversed_query", **options), best, closed.risk(best, EXAMPLES, ANISOTROPIC, BACKWARDS)
    )


def test_risks_with_task_or_random_covariance_agree_with_monte_carlo() -> None:
    inverse = tuple(1 / value for value in SPECTRUM)
    best = closed.optimal_preconditioner(ANISOTROPIC, EXAMPLES, task_covariance=np.diag(inverse))
    risk = closed.risk(best, EXAMPLES, ANISOTROPIC, task_covariance=np.diag(inverse))
    assert_risk(draw(covariance=SPECTRUM, task_covariance=inverse), best, risk)
    random = closed.exponential_preconditioner(DIMENSION, EXAMPLES) * ISOTROPIC
    assert_risk(
        draw(exponential_covariance=True), random, closed.exponential_risk(DIMENSION, EXAMPLES)
    )


def test_a_prompt_without_noise_is_linear_and_hides_the_label_of_its_query() -> None:
    batch = draw(prompts=50, covariance=SPECTRUM)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "examples": ((50, EXAMPLES + 1, DIMENSION + 1), np.float32),
        "target": ((50,), np.float32),
        "weights": ((50,), np.float32),
    }
    assert not batch["examples"][:, -1, -1].any()
    for prompt, target in zip(batch["examples"].astype(np.float64), batch["target"], strict=True):
        w, *_ = np.linalg.lstsq(prompt[:-1, :-1], prompt[:-1, -1])
        np.testing.assert_allclose(prompt[:-1, :-1] @ w, prompt[:-1, -1], atol=1e-5)
        assert prompt[-1, :-1] @ w == pytest.approx(target, abs=1e-4)


def test_the_target_has_no_noise_but_the_labels_do() -> None:
    batch, clean = (
        draw(noise=2.0, dimension=1),
        draw(noise=2.0, dimension=1, examples=1000, prompts=20),
    )
    # With 1000 examples the slope is known to 2 / sqrt(1000).
    slope = np.sum(clean["examples"][:, :-1, 0] * clean["examples"][:, :-1, 1], axis=1) / np.sum(
        clean["examples"][:, :-1, 0] ** 2, axis=1
    )
    np.testing.assert_allclose(clean["target"], slope * clean["examples"][:, -1, 0], atol=1.0)
    # The variance of a label is E (w x)^2 + s^2 = 1 + 4; its fourth moment is at most 9 + 24 + 48.
    labels = batch["examples"][:, :-1, 1].astype(np.float64)
    assert np.mean(labels**2) == pytest.approx(5, abs=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, r"config.task.examples must be an integer in \[1, 16777216\]; got 0"),
        ({"noise": -1.0}, r"config.task.noise must be a finite number in \[0, 1000\]; got -1.0"),
        (
            {"covariance": (1.0, 2.0)},
            r"covariance must be 5 positive eigenvalues, .*; got \(1.0, 2.0\)",
        ),
        (
            {"task_covariance": (1.0, 2.0, 3.0, 4.0, -5.0)},
            r"task_covariance must be .* in \[1e-12, 1e\+12\]; got \(1.0, 2.0, 3.0, 4.0, -5.0\)",
        ),
        (
            {"exponential_covariance": True, "test_reversed": True},
            "excludes covariance and test_reversed",
        ),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task("icl_regression", options)
