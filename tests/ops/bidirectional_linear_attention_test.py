"""Linear attention to all tokens: both orders, sums that documents share, and limits known
otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import bidirectional_linear_attention, gated_linear_attention
from ops.bidirectional_linear_attention import examples, xla
from tests.contracts.noncausal import NonCausalContract
from tests.contracts.ops import assert_close


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def features(seed, *shape):
    return jax.nn.elu(normal(seed, *shape)) + 1


class TestBidirectionalLinearAttention(NonCausalContract):
    op = staticmethod(bidirectional_linear_attention)
    examples = examples
    # Query heads, key heads; positive features with a denominator, signed ones without.
    variants = (
        "normalised",
        pytest.param("grouped", marks=pytest.mark.full),
        pytest.param("signed", marks=pytest.mark.slow),
    )

    def shape(self, variant, length):
        return super().shape(variant, length) | ({"heads": 6} if variant == "grouped" else {})

    def inputs(self, key, variant, length, dtype):
        inputs = super().inputs(key, variant, length, dtype)
        if variant == "signed":
            inputs |= {name: inputs[name] - 1 for name in "qk"}
        return inputs

    def options(self, variant, length):
        # Without an eps to speak of, the gradient of the only weight of a query is rounding alone.
        return {"normalise": variant != "signed", "eps": 0.5}


@pytest.mark.parametrize("cheap", ["pairs", "states"])
@pytest.mark.parametrize("normalise", [True, False])
def test_both_orders_equal_the_reference_where_queries_and_keys_differ_in_number(
    monkeypatch, cheap, normalise
):
    jax.clear_caches()  # the order is no argument of the program
    monkeypatch.setattr(xla, "pairs_are_cheaper", lambda *_: cheap == "pairs")
    q, k, v = features(0, 2, 21, 4, 6), features(1, 2, 34, 2, 6), normal(2, 2, 34, 2, 5)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 34)) < 0.6)
    results = []
    for implementation in ("reference", "xla"):

        def call(q, k, v, implementation=implementation):
            return bidirectional_linear_attention(
                *(q, k, v), normalise=normalise, key_mask=mask, implementation=implementation
            )

        o, pullback = jax.vjp(call, q, k, v)
        results.append((o, *pullback(normal(4, *o.shape))))
    for name, want, got in zip(("o", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, got, want)
    jax.clear_caches()


def test_the_order_with_fewer_multiplications_is_taken():
    def products(length):
        q, v = (jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32) for size in (16, 48))
        program = str(jax.make_jaxpr(lambda *x: bidirectional_linear_attention(*x))(q, q, v))
        return f"{length},{length}]" in program, "16,49]" in program

    # T^2 (K + V) against 2 T K V: equal at 24 tokens.
    assert products(24) == (True, False) and products(25) == (False, True)


def test_weights_are_positive_and_sum_to_one():
    q, k = features(0, 2, 50, 2, 8), features(1, 2, 50, 2, 8)
    o = bidirectional_linear_attention(q, k, jnp.full((2, 50, 2, 3), 0.7), eps=0.0)
    np.testing.assert_allclose(o, 0.7, rtol=1e-6)


def test_tokens_that_are_repeated_change_nothing_but_unnormalised_sums():
    q, k, v = features(0, 1, 30, 2, 8), features(1, 1, 30, 2, 8), normal(2, 1, 30, 2, 5)
    three = [jnp.tile(x, (1, 3, 1, 1)) for x in (k, v)]
    whole = bidirectional_linear_attention(q, k, v, eps=0.0)
    assert_close("o", bidirectional_linear_attention(q, *three, eps=0.0), whole)
    sums = bidirectional_linear_attention(q, k, v, normalise=False)
    assert_close("o", bidirectional_linear_attention(q, *three, normalise=False), 3 * sums)


def test_the_order_of_the_keys_does_not_matter():
    q, k, v = features(0, 2, 70, 2, 8), features(1, 2, 70, 2, 8), normal(2, 2, 70, 2, 5)
    order = np.random.default_rng(0).permutation(70)
    o = bidirectional_linear_attention(q, k, v)
    assert_close("o", bidirectional_linear_attention(q, k[:, order], v[:, order]), o)
    moved = bidirectional_linear_attention(q[:, order], k, v)
    assert_close("o of moved queries", moved, o[:, order])


def test_it_is_both_directions_of_the_recurrence_without_one_of_its_two_own_terms():
    q, k, v = (normal(seed, 2, 100, 2, 8) for seed in range(3))
    ids = jnp.asarray(np.arange(100)[None] // 37 * np.ones((2, 1), int))
    both = sum(
        gated_linear_attention(q, k, v, scale=1.0, segment_ids=ids, reverse=reverse)[0]
        for reverse in (False, True)
    )
    own = (q * k).sum(-1, keepdims=True) * v
    o = bidirectional_linear_attention(q, k, v, normalise=False, segment_ids=ids)
    assert_close("o", o, both - own)


def test_features_of_zero_have_outputs_and_gradients_of_zero_without_eps():
    q, k, v = jnp.zeros((1, 5, 1, 4)), features(1, 1, 5, 1, 4), normal(2, 1, 5, 1, 4)
    o, pullback = jax.vjp(lambda *x: bidirectional_linear_attention(*x, eps=0.0), q, k, v)
    for value in (o, *pullback(jnp.ones_like(o))):
        np.testing.assert_array_equal(value, 0.0)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    q, k, v = features(0, 2, 256, 2, 8), features(1, 2, 256, 2, 8), normal(2, 2, 256, 2, 5)
    _, pullback = jax.vjp(bidirectional_linear_attention, q, k, v)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    assert kept <= q.size + k.size + v.size


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(packed):
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None

        def loss(x, ids):
            return jnp.sum(jnp.sin(bidirectional_linear_attention(x, x, x, segment_ids=ids)))

        program = jax.jit(jax.grad(loss)).lower(x, ids).compile()
        return program.memory_analysis().temp_size_in_bytes

    # 16 times if it grew with the square.
    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 5, 4, 8), "k": ones(2, 5, 2, 8), "v": ones(2, 5, 2, 6)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 8)}),
        ("q", {"q": ones(2, 0, 4, 8)}),
        ("q", {"q": ones(2, 5, 4, 8, dtype=np.int32)}),
        ("k", {"k": ones(2, 5, 2, 7)}),
        ("k", {"k": ones(2, 5, 3, 8), "v": ones(2, 5, 3, 6)}),
        ("k", {"k": ones(2, 0, 2, 8), "v": ones(2, 0, 2, 6)}),
        ("v", {"v": ones(2, 4, 2, 6)}),
        ("v", {"v": ones(2, 5, 4, 6)}),
        ("v", {"v": ones(2, 5, 2, 0)}),
        ("eps", {"eps": -1e-6}),
        ("eps", {"eps": float("nan")}),
        ("eps", {"eps": True}),
        ("key_mask", {"key_mask": ones(2, 5)}),
        ("key_mask", {"key_mask": ones(2, 4, dtype=bool)}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        (
            "segment_ids",
            {
                "segment_ids": ones(2, 5, dtype=np.int32),
                "k": ones(2, 6, 2, 8),
                "v": ones(2, 6, 2, 6),
            },
        ),
        ("implementation", {"implementation": "chunked"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        bidirectional_linear_attention(**GOOD | change)
