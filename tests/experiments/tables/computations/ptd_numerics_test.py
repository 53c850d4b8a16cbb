"""The numbers behind perturb-then-diagonalise: gaps, bounds and the delay under a tone."""

import math

import numpy as np
import pytest

from experiments.tables.computations.ptd_numerics import (
    DELAY,
    STEP,
    delay_under_tones,
    held_states,
    measure,
    response_gap,
    system,
)
from models.parts.hippo import legs, normal_legs


@pytest.mark.parametrize(("size", "gap"), [(16, 0.6265), (32, 0.6341), (64, 0.6360)])
def test_the_gap_of_the_normal_part_does_not_close_with_the_size(size, gap):
    numbers = measure("s4d", size)
    assert numbers["response"]["gap_percent"] == pytest.approx(100 * gap, abs=0.02)
    assert gap < 2 / math.pi < gap + 0.02
    assert numbers["matrix"]["condition_log10"] == pytest.approx(0, abs=1e-6)
    assert numbers["matrix"]["rightmost"] == pytest.approx(-0.5)


@pytest.mark.parametrize("norm", [1e-4, 1e-2, 0.4])
def test_a_perturbation_changes_responses_by_no_more_than_its_size_allows(norm):
    A, B = legs(16)
    relative = norm / np.linalg.norm(A, 2)
    M, b = system("random", 16, gamma=1.0, relative=relative, seed=0)
    assert np.linalg.norm(M - A, 2) == pytest.approx(norm)
    assert 0 < response_gap(M, b, A, B) <= 4 * norm / (1 - 2 * norm)


def test_a_smaller_perturbation_has_a_smaller_gap_and_a_worse_condition():
    loose, middle, tight = (measure("ptd", 16, gamma=gamma) for gamma in (1.0, 10.0, 100.0))
    assert middle["response"]["gap_percent"] == pytest.approx(0.55, rel=0.05)
    for smaller, larger in ((tight, middle), (middle, loose)):
        assert smaller["response"]["gap_percent"] < larger["response"]["gap_percent"]
        assert smaller["matrix"]["condition_log10"] > larger["matrix"]["condition_log10"]


def test_a_tone_at_the_last_resonance_hurts_the_normal_part_alone():
    assert -np.imag(normal_legs(16)[0][0]) == pytest.approx(80.97, abs=0.01)
    s4, s4d, ptd = (
        {label: number["error_log10"] for label, number in numbers.items()}
        for numbers in (
            delay_under_tones("s4", 16),
            delay_under_tones("s4d", 16),
            delay_under_tones("ptd", 16, gamma=10.0),
        )
    )
    assert s4["clean"] < ptd["clean"] < s4d["clean"] < -1
    # The error that the tone adds, over the square of its strength.
    added = {
        name: (10 ** numbers["borrowed_spike"] - 10 ** numbers["borrowed_clean"]) / 0.01
        for name, numbers in (("s4", s4), ("s4d", s4d), ("ptd", ptd))
    }
    assert added["s4d"] > 1 > 0.1 > max(added["s4"], abs(added["ptd"]))
    assert s4["borrowed_spike"] == s4["spike"]


def test_held_states_are_those_of_the_differential_equation():
    """A constant input: h = M^-1 (exp(t M) - 1) b."""
    M, b = np.array([[-1.0, 2.0], [-2.0, -1.0]]), np.array([1.0, 0.5])
    states = held_states(M, b, np.ones((1, DELAY + 60)))[0]
    times = STEP * np.arange(DELAY + 1, DELAY + 61)
    eigenvalue, V = np.linalg.eig(M)
    growth = (np.exp(np.outer(times, eigenvalue)) - 1) / eigenvalue
    want = np.real((growth * np.linalg.solve(V, b.astype(complex))) @ V.T)
    np.testing.assert_allclose(states, want, rtol=1e-9)


def test_an_unknown_system_is_refused():
    with pytest.raises(ValueError, match="name must be one of 's4', 's4d'"):
        measure("dss", 16)
