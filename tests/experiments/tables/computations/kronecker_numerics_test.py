"""The error of polynomial Kronecker attention, and that our op makes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tables.computations import kronecker_numerics
from ops import kronecker_attention, polynomial_kronecker_attention


def errors(bound, degrees):
    return [
        kronecker_numerics.measure(bound, degree, seed=0)["polynomial"]["error_log10"]
        for degree in degrees
    ]


def test_the_error_falls_with_the_degree_and_grows_with_the_bound():
    at_low, at_high = errors(0.4, (1, 2, 4, 6)), errors(0.8, (1, 2, 4, 6))
    assert at_low == sorted(at_low, reverse=True) and at_high == sorted(at_high, reverse=True)
    assert all(low < high for low, high in zip(at_low, at_high, strict=True))
    # Scores stay below 0.8^3; of the sums of 64^2 terms less is left than of the worst one.
    assert all(
        error < math.log10(2 * 0.512 ** (degree + 1) / math.factorial(degree + 1))
        for error, degree in zip(at_high, (1, 2, 4, 6), strict=True)
    )


def test_an_even_degree_has_no_negative_denominator():
    for degree in (2, 4, 6):
        found = kronecker_numerics.measure(6.4, degree, seed=0)
        assert found["polynomial"]["negative"] == 0


@pytest.mark.slow
def test_the_op_has_this_error():
    rng = np.random.default_rng(0)  # the numbers of `measure`
    q, k1, k2 = rng.uniform(-1.6, 1.6, (3, 64, 3))
    v1, v2 = rng.uniform(-1, 1, (2, 64, 8))
    given = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k1, k2, v1, v2)]

    @jax.jit
    def difference(*given):
        near, _ = polynomial_kronecker_attention(*given, causal=False)
        return jnp.abs(near - kronecker_attention(*given)).max()

    (want,) = errors(1.6, (2,))
    assert math.log10(difference(*given)) == pytest.approx(want, abs=1e-3)
