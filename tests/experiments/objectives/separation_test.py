"""SI-SDR and its best assignment, against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.objectives.separation import Separation, assigned, si_sdr

RNG = np.random.default_rng(0)
SOURCES = RNG.standard_normal((3, 3, 50)).astype(np.float32) + 0.3
ESTIMATES = SOURCES[:, [1, 2, 0]] + 0.5 * RNG.standard_normal((3, 3, 50)).astype(np.float32)


def plain(estimate, source):
    e, s = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (estimate, source))
    target = (e @ s) / (s @ s) * s
    return 10 * np.log10(target @ target / ((e - target) @ (e - target)))


def best(estimates, sources):
    scores = [
        [plain(estimates[i], sources[q]) for q, i in enumerate(order)]
        for order in itertools.permutations(range(len(sources)))
    ]
    return max(scores, key=np.mean)


def test_si_sdr_is_that_of_its_definition_and_knows_no_scale():
    got = si_sdr(ESTIMATES, SOURCES)
    want = [
        [plain(e, s) for e, s in zip(*pair, strict=True)]
        for pair in zip(ESTIMATES, SOURCES, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(si_sdr(-7 * ESTIMATES + 2, SOURCES), got, rtol=1e-3, atol=1e-3)


def test_the_best_of_all_assignments_is_found():
    order, found, heard = assigned(ESTIMATES, SOURCES)
    assert np.all(np.asarray(order) == [2, 0, 1]) and np.all(heard)
    want = [best(e, s) for e, s in zip(ESTIMATES, SOURCES, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_silent_sources_count_for_nothing_and_all_derivatives_are_finite():
    """The second mixture has a silent source and a silent estimate, the third no sound at all, the
    fourth fills up the batch."""
    sources = np.concatenate((SOURCES, SOURCES[:1]))
    sources[1, 2] = 0.25  # silent but for its mean
    sources[2] = 0.0
    estimates = np.concatenate((ESTIMATES, np.full_like(ESTIMATES[:1], np.nan)))
    estimates[1, 0] = 0.0
    batch = {"mixture": sources.sum(axis=1), "sources": sources}
    batch["weights"] = np.array([1, 1, 1, 0], np.float32)
    objective = Separation(10)

    @jax.jit
    def score(estimates):
        return objective(lambda mixture: estimates, batch, jax.random.key(0))

    value, sums = score(estimates)
    first = np.mean(best(ESTIMATES[0], SOURCES[0]))
    # The silent estimate is left for the silent source.
    second = np.mean(best(estimates[1, 1:], sources[1, :2]))
    assert float(value) == pytest.approx(-(first + second) / 2, rel=1e-4)
    before = [
        plain(batch["mixture"][row], sources[row, q])
        for row, n in ((0, 3), (1, 2))
        for q in range(n)
    ]
    metrics = objective.metrics({name: float(total) for name, total in sums.items()})
    want = (first - np.mean(before[:3]) + second - np.mean(before[3:])) / 2
    assert metrics["si_sdri"] == pytest.approx(want, rel=1e-4)
    assert metrics["si_sdr"] == pytest.approx(-float(value))

    slopes = jax.jit(jax.grad(lambda e: score(e)[0]))(jnp.asarray(estimates))
    assert np.all(np.isfinite(slopes))
    assert np.abs(slopes[0]).max() > 0 and np.all(np.asarray(slopes)[2:] == 0)


def test_a_perfect_and_an_empty_estimate_have_finite_decibels():
    assert 60 < float(si_sdr(SOURCES[0, 0], SOURCES[0, 0])) < 120
    assert float(si_sdr(np.zeros(50), SOURCES[0, 0])) == pytest.approx(-80)


def test_work_is_counted_in_seconds():
    work = Separation(25).work({"mixture": np.zeros((3, 50))})
    assert (work.unit, work.count, work.length) == ("audio_seconds", 6.0, None)
    with pytest.raises(ValueError, match="Separation must have 'mixture'; got tokens"):
        Separation(25).work({"tokens": np.zeros((3, 50))})
