"""Kronecker attention: the contract, and values known otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import kronecker_attention, window_attention
from ops.kronecker_attention import examples
from tests.contracts.noncausal import NonCausalContract
from tests.contracts.ops import assert_close, assert_derivatives_equal


class TestKroneckerAttention(NonCausalContract):
    op = staticmethod(kronecker_attention)
    examples = examples
    variants = (
        pytest.param("plain", marks=pytest.mark.full),
        pytest.param("causal", marks=pytest.mark.slow),
    )
    sizes = (1, 37)  # one block, and two of queries and five of keys
    documents = (13, 1, 18, 5)
    masks = ()

    def options(self, variant, length):
        return {"causal": variant == "causal"}


NAMES = ("q", "k1", "k2", "v1", "v2")


def arguments(seed, length=21, batch=1, **sizes):
    shape = {**examples.SHAPES["test"], "batch": batch, "length": length, **sizes}
    return examples.inputs(shape, "", "float32", jax.random.key(seed))


def test_second_keys_and_values_of_ones_leave_softmax_attention():
    given = arguments(0, length=40)
    given |= {"k2": jnp.ones_like(given["k2"]), "v2": jnp.ones_like(given["v2"])}
    o = kronecker_attention(**given, causal=True)
    q, k, v = given["q"] * 3**0.5 / 3, given["k1"], given["v1"]  # it scales by 3^-0.5 itself
    want, _ = window_attention(q, k, v, window=40)
    assert_close("o", o, want)


def test_without_a_query_all_pairs_weigh_the_same():
    given = arguments(1)
    o = kronecker_attention(**given | {"q": jnp.zeros_like(given["q"])})
    want = given["v1"].mean(1, keepdims=True) * given["v2"].mean(1, keepdims=True)
    assert_close("o", o, jnp.broadcast_to(want, o.shape))


def test_the_two_sides_of_a_pair_change_places():
    q, k1, k2, v1, v2 = (arguments(2)[name] for name in NAMES)
    one, other = (kronecker_attention(q, *rest) for rest in ((k1, k2, v1, v2), (k2, k1, v2, v1)))
    assert_close("o", one, other)


def test_large_scores_are_a_maximum_and_no_overflow():
    given = {name: x * (40 if name in NAMES[:3] else 1) for name, x in arguments(3).items()}
    o = kronecker_attention(**given)
    assert_close("o", o, kronecker_attention(**given, implementation="reference"), 2e-4)


def test_no_array_of_all_triples_is_formed_forwards_or_backwards():
    length = 64
    given = jax.eval_shape(functools.partial(arguments, 0, length))

    def loss(given):
        return jnp.sum(kronecker_attention(**given))

    program = str(jax.make_jaxpr(jax.grad(loss))(given))
    assert f"{length},{length},{length}]" not in program
    sizes = [eqn.size for eqn in jax.tree.leaves(jax.eval_shape(jax.grad(loss), given))]
    assert max(sizes) < length**3


@pytest.mark.full
def test_second_derivatives_are_those_of_the_reference():
    given = arguments(4, length=5)

    def function(implementation):
        return lambda given: kronecker_attention(**given, implementation=implementation)

    assert_derivatives_equal(function("xla"), function("reference"), given)


def ones(*shape):
    return np.ones(shape, np.float32)


GOOD = {name: ones(2, 5, 4, 3) for name in ("q", "k1", "k2")} | {
    name: ones(2, 5, 4, 6) for name in ("v1", "v2")
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 3)}),
        ("k1", {"k1": ones(2, 4, 4, 3)}),
        ("k2", {"k2": ones(2, 5, 4, 2)}),
        ("v1", {"v1": ones(2, 5, 2, 6)}),
        ("v2", {"v2": ones(2, 5, 4, 5)}),
        ("scale", {"scale": 0.0}),
        ("causal", {"causal": 1}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("implementation", {"implementation": "pallas_tpu"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        kronecker_attention(**GOOD | change)
