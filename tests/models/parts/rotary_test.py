"""Angles for long contexts against what their authors say of single pairs."""

import math

import numpy as np
import pytest

from models.parts.rotary import check_scaling, scaled_frequencies

SIZE, BASE, LENGTH = 64, 10000.0, 512


def turns(pair: int) -> float:
    """How often a pair turns in LENGTH tokens without a scaling."""
    return LENGTH * BASE ** (-2 * pair / SIZE) / (2 * math.pi)


def test_llama3_leaves_fast_pairs_divides_slow_ones_and_is_between_them_in_proportion() -> None:
    found, factor = scaled_frequencies(SIZE, BASE, ("llama3", 8.0, 1.0, 4.0, LENGTH))
    assert factor == 1.0
    kinds = set()
    for pair in range(SIZE // 2):
        plain = BASE ** (-2 * pair / SIZE)
        share = (turns(pair) - 1.0) / 3.0
        kind = "fast" if share > 1 else "slow" if share < 0 else "between"
        kinds.add(kind)
        between = (1 - share) * plain / 8.0 + share * plain
        want = {"fast": plain, "slow": plain / 8.0, "between": between}[kind]
        np.testing.assert_allclose(found[pair], want, rtol=1e-6)
    assert len(kinds) == 3


def test_yarn_is_a_ramp_over_pairs_between_the_turns() -> None:
    found, factor = scaled_frequencies(SIZE, BASE, ("yarn", 4.0, 32.0, 1.0, LENGTH, 1.25))
    assert factor == 1.25
    plain = BASE ** (-2 * np.arange(SIZE // 2) / SIZE)
    # Pairs below the first with fewer than 32 turns are as they are; those with less than one turn
    # are divided; the ramp is straight.
    first = next(pair for pair in range(SIZE) if turns(pair) < 32) - 1
    last = next(pair for pair in range(SIZE) if turns(pair) < 1)
    kept = (found / plain - 1 / 4) / (1 - 1 / 4)
    assert 0 < first < last < SIZE // 2 - 1
    np.testing.assert_allclose(kept[: first + 1], 1, atol=1e-6)
    np.testing.assert_allclose(kept[last:], 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(kept[first : last + 1]), -1 / (last - first), atol=1e-6)


def test_linear_divides_all() -> None:
    found, factor = scaled_frequencies(SIZE, BASE, ("linear", 2.0))
    want = BASE ** (-2 * np.arange(SIZE // 2) / SIZE) / 2
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert factor == 1.0


@pytest.mark.parametrize("scaling", [("ntk", 2.0), ("linear",), ("linear", 0.0), ("linear", "2")])
def test_a_scaling_that_does_not_exist_is_refused_with_those_that_do(scaling: tuple) -> None:
    with pytest.raises(ValueError, match=r"rope_scaling must be .*\('linear', factor\)"):
        check_scaling(scaling)
