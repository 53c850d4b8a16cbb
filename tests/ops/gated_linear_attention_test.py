"""Gated linear attention: the op contract, and identities of Yang et al., arXiv 2312.06635."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from experiments.compiled.kernels import kernel_calls
from ops import gated_linear_attention, kernels
from ops.gated_linear_attention import examples
from ops.gated_linear_attention import pallas_gpu as gpu_kernels
from ops.gpu import pieces, tiles
from tests.contracts.ops import (
    BATCH,
    LENGTH,
    OpContract,
    SegmentStatesContract,
    assert_close,
    hard_decay_log,
)

KEY_HEADS, HEADS, KEY, VALUE = (
    examples.SHAPES["test"][name] for name in ("key_heads", "heads", "key", "value")
)  # chunks of 32 tokens


class TestGatedLinearAttention(OpContract):
    variants = ("none", pytest.param("constant", marks=pytest.mark.slow), "scalar", "vector")
    implementations = ("xla",)
    isolates = "chunk"
    op = gated_linear_attention
    examples = examples

    def initial_state(self, key, variant):
        return jax.random.normal(key, (BATCH, HEADS, KEY, VALUE))

    # Slow; the everyday tests have those of causal flow attention, which calls this op.
    @pytest.mark.full
    def test_derivatives_of_any_order_equal_those_of_the_reference(self, variant, implementation):
        super().test_derivatives_of_any_order_equal_those_of_the_reference(variant, implementation)


class TestSegmentStates(SegmentStatesContract):
    contract = TestGatedLinearAttention()
    variants = (
        *(pytest.param(v, marks=pytest.mark.full) for v in ("none", "constant")),
        pytest.param("scalar", marks=pytest.mark.full),
        pytest.param("vector", marks=pytest.mark.slow),
    )
    implementations = ("xla", "pallas_tpu")


# Relative L2 against the float32 reference fed the same rounded inputs. bfloat16 inputs: factors of
# matmuls are rounded to 8 bits (2^-9 each, independent), then the outputs; gradients pass two such
# products, those of decays three.
BFLOAT16_L2 = {"o": 1e-2, "final state": 1e-2, "gradient of decay_log": 3e-2, "gradient": 2e-2}


def assert_l2_close(name, got, expected, limits):
    limit = limits.get(name, limits["gradient"])
    got, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, expected))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= limit, f"{name}: relative L2 error {error:.1e} > {limit:.0e}"


@pytest.mark.full
class TestKernels(TestGatedLinearAttention):
    """The kernels, interpreted: the whole contract. What `make test` runs of it stands below."""

    implementations = ("pallas_gpu", "pallas_tpu")
    isolates = ""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation, dtype):
        if dtype == "float32":
            super().test_values_states_and_gradients_equal_the_reference(
                variant, implementation, dtype
            )
            return
        inputs, state, ids = self.data(variant, LENGTH, dtype)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        for name in expected:
            assert_l2_close(name, got[name], expected[name], BFLOAT16_L2)


KERNELS = pytest.mark.parametrize("kernels", ["pallas_gpu", "pallas_tpu"])


@pytest.mark.parametrize(
    "variant",
    [
        # Nothing but segments ends what a state holds: hard decays would hide one that is missed.
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("constant", marks=pytest.mark.full),
        pytest.param("scalar", marks=pytest.mark.slow),
        pytest.param("vector", marks=pytest.mark.slow),
    ],
)
@KERNELS
def test_kernels_equal_the_reference(variant, kernels):
    contract = TestGatedLinearAttention()
    # Three quarters of one chunk of 64 tokens.
    inputs, state, ids = contract.data(variant, 40)
    expected = contract.values_and_gradients("reference", inputs, state, ids)
    got = contract.values_and_gradients(kernels, inputs, state, ids)
    for name in expected:
        assert_close(name, got[name], expected[name])


@pytest.mark.slow
@KERNELS
def test_kernels_carry_their_state_over_chunks_and_segments(kernels):
    contract = TestGatedLinearAttention()
    inputs, state, ids = contract.data("scalar", LENGTH)
    expected = contract.forward("reference", inputs, state, ids)
    for name, got, wanted in zip(
        ("o", "final state"), contract.forward(kernels, inputs, state, ids), expected, strict=True
    ):
        assert_close(name, got, wanted)


# Key heads, heads, K, V: heads that fill lanes only together, one key head for several grid steps,
# K and V beyond 128.
SIZES = [(2, 2, 64, 64), (3, 3, 96, 128), (1, 4, 16, 256), (1, 8, 128, 128), (2, 4, 256, 64)]


@pytest.mark.full
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("variant", ["scalar", "vector"])
@KERNELS
def test_kernels_take_any_size_and_group_of_heads(sizes, variant, kernels):
    key_heads, heads, key, value = sizes
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (jax.random.normal(x, (1, 150, key_heads, key)) for x in keys[:2])
    v, do = (jax.random.normal(x, (1, 150, heads, value)) for x in keys[2:4])
    g = hard_decay_log(keys[4], (1, 150, heads) + ((key,) if variant == "vector" else ()))

    def gradients(implementation):
        def loss(*inputs):
            o, state = gated_linear_attention(*inputs, implementation=implementation)
            return jnp.sum(o * do) + jnp.sum(jnp.sin(state))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, g)

    for name, got, wanted in zip("qkvg", gradients(kernels), gradients("reference"), strict=True):
        assert_close(f"gradient of {name}", got, wanted, 1e-5)


def test_a_program_lowered_for_a_tpu_takes_the_kernels():
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

    def loss(q, k, v):
        return gated_linear_attention(q, k, v)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, x, x)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_without_kernels_a_program_lowered_for_a_tpu_takes_the_chunked_form():
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

    def lowered(implementation=None):
        def loss(q, k, v):
            o, _ = gated_linear_attention(q, k, v, implementation=implementation)
            return o.astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    with kernels(False):
        assert "tpu_custom_call" not in lowered()
        assert "tpu_custom_call" in lowered("pallas_tpu")  # one that is named runs
    assert "tpu_custom_call" in lowered()


def test_a_program_lowered_for_a_gpu_takes_the_kernels_where_they_can():
    def kernels(key):
        x = jax.ShapeDtypeStruct((1, 256, 2, key), jnp.bfloat16)

        def loss(q, k, v):
            return gated_linear_attention(q, k, v)[0].astype(jnp.float32).sum()

        jaxpr = jax.make_jaxpr(jax.jit(jax.value_and_grad(loss, (0, 1, 2))))(x, x, x)
        return [call.params["name"] for call in kernel_calls(jaxpr, "cuda")]

    names = kernels(128)
    assert names[-1] == "gla_chunk_gradients" and "gla_forward" in names
    assert not kernels(300)


def test_segment_states_take_the_kernels_of_a_tpu_and_on_a_gpu_the_chunked_form():
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    run = functools.partial(gated_linear_attention, num_segments=3)
    jaxpr = jax.make_jaxpr(lambda x, ids: run(x, x, x, segment_ids=ids))(x, ids)
    assert len(list(kernel_calls(jaxpr, "tpu"))) == 1
    assert not list(kernel_calls(jaxpr, "cuda"))


def random_case(seed, variant, length=37) -> tuple[Any, ...]:
    inputs, _, _ = TestGatedLinearAttention().data(variant, length, seed=seed)
    return inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), inputs.get("decay_log")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_decay_constant_over_channels_is_a_scalar_decay(seed):
    q, k, v, g = random_case(seed, "scalar")
    o, S = gated_linear_attention(q, k, v, g)
    o_vector, S_vector = gated_linear_attention(
        q, k, v, jnp.broadcast_to(g[..., None], (*g.shape, KEY))
    )
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
    assert_close(
        "values", gated_linear_attention(k, jnp.zeros_like(k), v, scale=1.0, initial_state=S)[0], v
    )
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
    return {
        "q": q,
        "k": q,
        "v": jnp.ones((2, 5, 4, 3)),
        "decay_log": jnp.zeros((2, 5, 4)),
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((2, 5, 4))}, r"q must be \[B, T, HK, K\].*got \(2, 5, 4\)"),
        ({"q": jnp.ones((2, 0, 2, 4))}, "q must be .* at least 1"),
        (
            {"k": jnp.ones((2, 5, 2, 6))},
            r"k must be .* like q, expected \(2, 5, 2, 4\); got \(2, 5, 2, 6\)",
        ),
        ({"v": jnp.ones((2, 6, 4, 3))}, "v must be .* with B and T of q"),
        ({"v": jnp.ones((2, 5, 3, 3))}, "v must be .* multiple of the 2 heads"),
        ({"q": jnp.ones((2, 5, 2, 4), jnp.int32)}, "q must be a floating-point array; got int32"),
        ({"decay_log": jnp.zeros((2, 5))}, "decay_log must be None"),
        ({"decay_log": jnp.zeros((2, 5, 4, 3))}, r"decay_log must be \[B, T, H, K\]"),
        (
            {"decay_log": jnp.full((2, 5, 4), 0.5)},
            r"decay_log must be finite and <= 0; got 0.5 at index \(0, 0, 0\)",
        ),
        ({"decay_log": jnp.full((2, 5, 4), -jnp.inf)}, "decay_log must be finite"),
        ({"initial_state": jnp.zeros((2, 4, 3, 4))}, "initial_state must be"),
        ({"segment_ids": jnp.zeros((2, 5))}, "segment_ids must be an integer array; got float32"),
        ({"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids must be \[B, T\]"),
        ({"num_segments": 2}, r"segment_ids must be \[B, T\] where num_segments .*None"),
        (
            {"num_segments": 0, "segment_ids": jnp.zeros((2, 5), int)},
            "num_segments must be an integer >= 1 or None; got 0",
        ),
        (
            {"num_segments": 2, "segment_ids": jnp.full((2, 5), 2)},
            r"segment_ids must be in 0..1 .*got 2.0 at index \(0, 0\)",
        ),
        (
            {"num_segments": 2, "segment_ids": jnp.zeros((2, 5), int).at[1, 2].set(1)},
            "segment_ids must be non-decreasing along time; got 0.0 at index"
            r" \(1, 3\)",
        ),
        (
            {
                "num_segments": 2,
                "segment_ids": jnp.zeros((2, 5), int),
                "initial_state": jnp.zeros((2, 4, 4, 3)),
            },
            r"initial_state must be \[B, num_segments, H, K, V\]",
        ),
        (
            {
                "num_segments": 2,
                "segment_ids": jnp.zeros((2, 5), int),
                "implementation": "pallas_gpu",
            },
            "gated_linear_attention with num_segments must be .*got 'pallas_gpu'",
        ),
        (
            {"implementation": "fast"},
            "implementation of gated_linear_attention must be .*got 'fast'",
        ),
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


def test_checks_find_what_is_not_finite_beside_segments():
    ids = jnp.array([[0, 0, 1, 1, 1]] * 2)

    def run(v, ids=ids):
        return gated_linear_attention(**arguments(v=v), segment_ids=ids)[0]

    good = jnp.ones_like(arguments()["v"])
    bad = good.at[0, 0].set(jnp.inf)
    assert_close("o", ops.checks(run)(good), run(good))
    with pytest.raises(Exception, match="o must be finite where segment_ids are given"):
        ops.checks(run)(bad)
    ops.checks(lambda v: run(v, ids=None))(bad)  # one segment: whose it is


@KERNELS
def test_kernels_leave_the_state_alone_after_the_last_token(kernels):
    contract = TestGatedLinearAttention()
    inputs, state, _ = contract.data("constant", 11)  # a part of a single chunk
    _, expected = contract.forward("reference", inputs, state)
    _, got = contract.forward(kernels, inputs, state)
    assert_close("final state", got, expected)


@pytest.mark.parametrize(
    ("variant", "reverse"),
    [
        pytest.param("none", False, marks=pytest.mark.full),
        pytest.param("constant", False, marks=pytest.mark.full),
        pytest.param("constant", True, marks=pytest.mark.full),
        pytest.param("scalar", False, marks=pytest.mark.full),
        pytest.param("scalar", True, marks=pytest.mark.slow),
        pytest.param("vector", False, marks=pytest.mark.full),
    ],
)
def test_gpu_kernels_cut_a_long_sequence_into_parts(variant, reverse):
    contract = TestGatedLinearAttention()
    length = 150
    assert length > 2 * gpu_kernels.chunk_length(length)
    inputs, state, ids = contract.data(variant, length)
    run = functools.partial(contract.values_and_gradients, reverse=reverse)
    expected = run("reference", inputs, state, ids)
    with mock.patch.object(tiles, "split_time", return_value=2):
        got = run("pallas_gpu", inputs, state, ids)
    for name in expected:
        assert_close(name, got[name], expected[name])


@pytest.mark.parametrize(
    ("length", "reverse"),
    [
        pytest.param(128, False, marks=pytest.mark.full),
        pytest.param(150, False, marks=pytest.mark.full),
        pytest.param(150, True, marks=pytest.mark.slow),
    ],
)
def test_gpu_kernels_take_a_long_sequence_piece_by_piece(length, reverse):
    """Two pieces of 64 tokens, and a rest where there is one."""
    contract = TestGatedLinearAttention()
    inputs, state, ids = contract.data("vector", length)
    end = length - 65 if reverse else 63
    ids = ids.at[0, end : end + 2].set(jnp.array([90, 91]))  # a segment ends with a piece
    run = functools.partial(contract.values_and_gradients, reverse=reverse)
    expected = run("reference", inputs, state, ids)
    with mock.patch.object(pieces, "MAX_TOKENS", 1):
        got = run("pallas_gpu", inputs, state, ids)
    for name in expected:
        assert_close(name, got[name], expected[name])


def test_time_is_cut_until_the_programs_fill_a_gpu():
    assert tiles.split_time(chunks=1024, programs=264) == 1
    assert tiles.split_time(chunks=1024, programs=32) == 8
    assert tiles.split_time(chunks=31, programs=1) == 2  # eight chunks at least


def test_gpu_kernels_refuse_what_they_do_not_take():
    x = jnp.zeros((1, 16, 1, 300))
    with pytest.raises(ValueError, match=r"'pallas_gpu' takes .*K and V up to 256.*300"):
        gated_linear_attention(x, x, x, implementation="pallas_gpu")
