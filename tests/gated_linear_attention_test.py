"""Gated linear attention: the op contract, and identities of Yang et al., arXiv 2312.06635."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops import gated_linear_attention
from tests.op_contract import BATCH, OpContract, assert_close, hard_decay_log

KEY_HEADS, HEADS, KEY, VALUE = 2, 4, 20, 24  # chunks of 32 tokens


def decay_shape(variant, length):
    return {"constant": (HEADS,), "scalar": (BATCH, length, HEADS), "vector": (BATCH, length, HEADS, KEY)}[variant]


def attention_inputs(key, variant, length, dtype):
    keys = jax.random.split(key, 4)
    inputs = {
        "q": jax.random.normal(keys[0], (BATCH, length, KEY_HEADS, KEY), dtype),
        "k": jax.random.normal(keys[1], (BATCH, length, KEY_HEADS, KEY), dtype),
        "v": jax.random.normal(keys[2], (BATCH, length, HEADS, VALUE), dtype),
    }
    if variant != "none":
        inputs["decay_log"] = hard_decay_log(keys[3], decay_shape(variant, length))
    if variant == "constant":
        inputs["decay_log"] = jnp.array([-1e4, -0.05, 0.0, -1e-3])
    return inputs


class TestGatedLinearAttention(OpContract):
    variants = ("none", "constant", "scalar", "vector")
    implementations = ("chunked",)
    op = gated_linear_attention

    def inputs(self, key, variant, length, dtype):
        return attention_inputs(key, variant, length, dtype)

    def initial_state(self, key, variant):
        return jax.random.normal(key, (BATCH, HEADS, KEY, VALUE))


def random_case(seed, variant, length=37) -> tuple[Any, ...]:
    inputs = attention_inputs(jax.random.key(seed), variant, length, "float32")
    return inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), inputs.get("decay_log")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_decay_constant_over_channels_is_a_scalar_decay(seed):
    q, k, v, g = random_case(seed, "scalar")
    o, S = gated_linear_attention(q, k, v, g)
    o_vector, S_vector = gated_linear_attention(q, k, v, jnp.broadcast_to(g[..., None], (*g.shape, KEY)))
    assert_close("o", o_vector, o)
    assert_close("final state", S_vector, S)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_gauge_of_the_key_channels_leaves_the_output(seed):
    q, k, v, g = random_case(seed, "vector")
    gauge = jnp.exp(jax.random.normal(jax.random.key(seed), (1, 1, 1, KEY)))
    o, _ = gated_linear_attention(q, k, v, g)
    o_gauged, _ = gated_linear_attention(q * gauge, k / gauge, v, g)
    assert_close("o", o_gauged, o)


def test_a_huge_decay_forgets_everything_before_it():
    q, k, v, g = random_case(0, "vector")
    g = g.at[:, 20].set(-1e4)
    o, S = gated_linear_attention(q, k, v, g)
    o_late, S_late = gated_linear_attention(q[:, 20:], k[:, 20:], v[:, 20:], g[:, 20:])
    assert_close("o", o[:, 20:], o_late)
    assert_close("final state", S, S_late)


def test_zero_decay_is_no_decay_and_padding_with_zeros_keeps_the_state():
    q, k, v, _ = random_case(1, "none")
    o, S = gated_linear_attention(q, k, v)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 5), (0, 0), (0, 0))) for x in (q, k, v))
    o_padded, S_padded = gated_linear_attention(q, k, v, jnp.zeros((BATCH, 42, HEADS)))
    assert_close("o", o_padded[:, :37], o)
    assert_close("final state", S_padded, S)


def test_orthonormal_keys_return_their_values():
    v = jax.random.normal(jax.random.key(0), (1, KEY, 1, VALUE))
    k = jnp.eye(KEY)[None, :, None]
    o, S = gated_linear_attention(jnp.zeros_like(k), k, v)
    assert_close("values", gated_linear_attention(k, jnp.zeros_like(k), v, scale=1.0, initial_state=S)[0], v)
    assert not o.any()


@pytest.mark.parametrize("variant", ["scalar", "vector"])
def test_memory_of_the_backward_pass_does_not_hold_a_state_per_token(variant):
    length, key, value = 1024, 64, 64
    q = k = jax.ShapeDtypeStruct((1, length, 1, key), jnp.float32)
    v = jax.ShapeDtypeStruct((1, length, 1, value), jnp.float32)
    g = jax.ShapeDtypeStruct((1, length, 1) + ((key,) if variant == "vector" else ()), jnp.float32)

    def loss(*args):
        return gated_linear_attention(*args)[0].sum()

    memory = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, k, v, g).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.5 * length * key * value * 4


def arguments(**changes):
    q = jnp.ones((2, 5, 2, 4))
    return {"q": q, "k": q, "v": jnp.ones((2, 5, 4, 3)), "decay_log": jnp.zeros((2, 5, 4))} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((2, 5, 4))}, r"q must be \[B, T, HK, K\].*got \(2, 5, 4\)"),
        ({"q": jnp.ones((2, 0, 2, 4))}, "q must be .* at least 1"),
        ({"k": jnp.ones((2, 5, 2, 6))}, r"k must be .* like q, expected \(2, 5, 2, 4\); got \(2, 5, 2, 6\)"),
        ({"v": jnp.ones((2, 6, 4, 3))}, "v must be .* with B and T of q"),
        ({"v": jnp.ones((2, 5, 3, 3))}, "v must be .* multiple of the 2 heads"),
        ({"q": jnp.ones((2, 5, 2, 4), jnp.int32)}, "q must be a floating-point array; got int32"),
        ({"decay_log": jnp.zeros((2, 5))}, "decay_log must be None"),
        ({"decay_log": jnp.zeros((2, 5, 4, 3))}, r"decay_log must be \[B, T, H, K\]"),
        ({"decay_log": jnp.full((2, 5, 4), 0.5)}, r"decay_log must be finite and <= 0; got 0.5 at index \(0, 0, 0\)"),
        ({"decay_log": jnp.full((2, 5, 4), -jnp.inf)}, "decay_log must be finite"),
        ({"initial_state": jnp.zeros((2, 4, 3, 4))}, "initial_state must be"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids must be an integer array; got float32"),
        ({"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids must be \[B, T\]"),
        ({"implementation": "fast"}, "implementation of gated_linear_attention must be .*got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments(**changes))


def test_checks_find_a_positive_decay_under_jit():
    def run(g):
        return gated_linear_attention(**arguments(decay_log=g))[0]

    good = jnp.full((2, 5, 4), -0.1)
    jax.jit(run)(-good)  # invisible to a compiled program
    assert_close("o", ops.checks(run)(good), run(good))
    with pytest.raises(Exception, match="decay_log must be finite and <= 0"):
        ops.checks(run)(-good)
