"""Polynomial Kronecker attention: the contract, and how near it is to the exponential's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import kronecker_attention, polynomial_kronecker_attention
from ops.polynomial_kronecker_attention import examples, xla
from ops.polynomial_kronecker_attention.reference import monomials
from tests.contracts.noncausal import NonCausalContract
from tests.contracts.ops import OpContract, assert_close

HEADS, KEY, VALUE = (examples.SHAPES["test"][name] for name in ("heads", "key", "value"))


class TestPolynomialKroneckerAttention(OpContract):
    op = staticmethod(polynomial_kronecker_attention)
    examples = examples
    variants = (pytest.param("", marks=pytest.mark.slow),)
    implementations = ("xla",)
    isolates = "chunk"

    def initial_state(self, key, variant):
        """What three tokens leave."""
        return polynomial_kronecker_attention(**self.inputs(key, variant, 3, "float32"))[1]


class TestWithoutACausalOrder(NonCausalContract):
    examples = examples
    variants = (pytest.param("", marks=pytest.mark.slow),)
    sizes = (3, 37)  # of one token alone gradients of keys are rounding
    documents = (13, 1, 18, 5)
    masks = ()

    @staticmethod
    def op(q, k1, k2, v1, v2, **options):
        return polynomial_kronecker_attention(q, k1, k2, v1, v2, causal=False, **options)[0]

    def options(self, variant, length):
        return {}


def arguments(seed, length, bound):
    """Entries of q and of keys below `bound`."""
    shape = {"batch": 1, "length": length, "heads": 1, "key": 3, "value": 4}
    given = examples.inputs(shape, "", "float32", jax.random.key(seed))
    rng = np.random.default_rng(seed)
    bounded = {n: rng.uniform(-bound, bound, given[n].shape) for n in ("q", "k1", "k2")}
    return given | {name: jnp.asarray(x, jnp.float32) for name, x in bounded.items()}


@pytest.mark.parametrize("causal", [True, False])
def test_it_nears_the_exponential_as_the_degree_grows(causal):
    given = arguments(0, 24, 0.8)
    want = kronecker_attention(**given, causal=causal)
    errors = []
    for degree in (1, 2, 4):
        call = jax.jit(
            functools.partial(polynomial_kronecker_attention, degree=degree, causal=causal)
        )
        errors.append(float(jnp.abs(call(**given)[0] - want).max()))
    # At these entries the remainder of degree g is that of 0.512^(g + 1) / (g + 1)!.
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 2e-6


def test_a_polynomial_of_the_scores_is_what_the_features_make():
    given = arguments(1, 9, 1.0)
    q, k1, k2, v1, v2 = (np.asarray(given[n], np.float64)[0, :, 0] for n in given)
    A = np.einsum("il,jl,kl->ijk", q, k1, k2) * 0.7
    p = 1 + A + A**2 / 2 + A**3 / 6
    want = np.einsum("ijk,jv,kv->iv", p, v1, v2) / p.sum((1, 2))[:, None]
    o, _ = polynomial_kronecker_attention(**given, degree=3, scale=0.7, causal=False)
    assert_close("o", o[0, :, 0], want)


def test_degree_zero_is_the_product_of_the_means_so_far():
    given = arguments(2, 20, 1.0)
    o, _ = polynomial_kronecker_attention(**given, degree=0)
    count = jnp.arange(1, 21)[None, :, None, None]
    assert_close("o", o, (given["v1"].cumsum(1) / count) * (given["v2"].cumsum(1) / count))


def test_features_are_the_monomials_of_the_degree_or_less():
    x = np.random.default_rng(0).standard_normal(4)
    for degree in (0, 1, 4):
        found = monomials(4, degree)
        assert len(found) == math.comb(4 + degree, degree) == len(set(found))
        got = xla.features(jnp.asarray(x, jnp.float32), degree)
        np.testing.assert_allclose(got, [np.prod(x[list(a)]) for a in found], rtol=1e-5)


def test_what_makes_no_sense_together_is_refused():
    given = arguments(3, 5, 1.0)
    _, state = polynomial_kronecker_attention(**given)
    for change in ({"initial_state": state}, {"reverse": True}):
        with pytest.raises(ValueError, match="initial_state must be None and reverse False"):
            polynomial_kronecker_attention(**given, causal=False, **change)
    with pytest.raises(ValueError, match="degree "):
        polynomial_kronecker_attention(**given, degree=-1)
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, 2, R, V \+ 1\]"):
        polynomial_kronecker_attention(**given, degree=3, initial_state=state)
