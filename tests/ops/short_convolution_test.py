"""Short convolution: the op contract, and its meaning as a convolution inside runs of equal segment
ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import short_convolution
from ops.short_convolution import examples, pallas_tpu
from tests.contracts.ops import BATCH, LENGTH, TOLERANCE, OpContract, assert_close

convolve = jax.jit(short_convolution, static_argnames="implementation")
WIDTH, TAPS = examples.SHAPES["test"]["width"], examples.SHAPES["test"]["taps"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class TestShortConvolution(OpContract):
    variants = ("4 taps", "1 tap")
    implementations = ("xla",)
    op = short_convolution
    examples = examples

    def shape(self, variant, length):
        return super().shape(variant, length) | {"taps": int(variant[0])}

    def initial_state(self, key, variant):
        return jax.random.normal(key, (BATCH, int(variant[0]) - 1, WIDTH))


@pytest.mark.full
class TestPallasTpu(TestShortConvolution):
    """The TPU kernels, interpreted: the whole contract. What `make test` runs of it stands
    below."""

    implementations = ("pallas_tpu",)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_states_and_gradients_equal_the_reference(self, variant, implementation, dtype):
        inputs, state, ids = self.data(variant, LENGTH, dtype)
        expected = self.values_and_gradients("reference", inputs, state, ids)
        got = self.values_and_gradients(implementation, inputs, state, ids)
        # bfloat16: rounded results, of a cotangent of y that XLA need not have rounded for the
        # reference.
        tolerance = 2 * TOLERANCE[dtype] if dtype == "bfloat16" else TOLERANCE[dtype]
        for name in expected:
            assert got[name].dtype == expected[name].dtype, name
            assert_close(name, got[name], expected[name], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_tpu_kernels_equal_the_reference_over_chunks_and_segments(reverse, monkeypatch):
    # Three chunks of 16 tokens, in two pieces each, and a token.
    tuning = pallas_tpu.Tuning(chunk=16, rows=8)
    monkeypatch.setattr(pallas_tpu, "TUNING", tuning)
    contract = TestShortConvolution()
    case = contract.data("4 taps", 49)
    expected = contract.values_and_gradients("reference", *case, reverse=reverse)
    got = contract.values_and_gradients("pallas_tpu", *case, reverse=reverse)
    for name in expected:
        assert_close(name, got[name], expected[name])


def test_a_program_lowered_for_a_tpu_takes_the_kernels():
    x, w = normal(5, 1, 256, 128), normal(6, 4, 128)

    def loss(x, w):
        return short_convolution(x, w)[0].sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(x, w)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == 2
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


both = pytest.mark.parametrize("implementation", ["reference", "xla"])


@pytest.mark.parametrize("tested", ["xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)])
def test_more_taps_than_tokens_equal_the_reference(tested):
    x, w = normal(0, BATCH, 5, WIDTH), normal(1, 12, WIDTH)
    state, ids = (normal(2, BATCH, 11, WIDTH), jnp.array([[0, 0, 1, 1, 0], [2, 2, 2, 2, 2]]))
    cotangents = (normal(3, *x.shape), normal(4, *state.shape))

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(implementation, x, w, state):
        outputs, pullback = jax.vjp(
            lambda x, w, state: short_convolution(
                x, w, initial_state=state, segment_ids=ids, implementation=implementation
            ),
            *(x, w, state),
        )
        return *outputs, *pullback(cotangents)

    names = ("y", "final state", "gradient of x", "gradient of w", "gradient of initial_state")
    results = (
        values_and_gradients(implementation, x, w, state)
        for implementation in (tested, "reference")
    )
    for name, got, expected in zip(names, *results, strict=True):
        assert_close(name, got, expected)


@both
def test_it_is_a_convolution_inside_runs_of_equal_ids(implementation):
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])[None, :, None]
    w = jnp.array([100.0, 10.0, 1.0])[:, None]  # the last tap is for the current token
    before = jnp.array([8.0, 9.0])[None, :, None]
    ids = jnp.array([[0, 0, 1, 1, 0]])  # the id 0 comes back: a third segment
    y, state = convolve(x, w, initial_state=before, segment_ids=ids, implementation=implementation)
    np.testing.assert_array_equal(y[0, :, 0], [1 + 90 + 800, 2 + 10 + 900, 3, 4 + 30, 5])
    np.testing.assert_array_equal(state[0, :, 0], [0, 5])


@both
def test_without_segments_it_is_numpys_convolution(implementation):
    x, w = normal(0, BATCH, 30, WIDTH), normal(1, TAPS, WIDTH)
    y, state = convolve(x, w, implementation=implementation)
    for b in range(BATCH):
        for d in range(WIDTH):
            # The first tap of a convolution is for the current token.
            expected = np.convolve(
                np.asarray(x[b, :, d], np.float64), np.asarray(w[::-1, d], np.float64)
            )[:30]
            assert_close(f"y[{b}, :, {d}]", y[b, :, d], expected)
    np.testing.assert_array_equal(state, x[:, -(TAPS - 1) :])


@both
def test_the_state_keeps_the_inputs_exactly_in_float32(implementation):
    x = normal(1, BATCH, 2, WIDTH).astype(jnp.bfloat16)
    y, state = convolve(x, jnp.ones((TAPS, WIDTH), jnp.bfloat16), implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    np.testing.assert_array_equal(state, jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 0), (0, 0))))


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"x": ones(2, 5, 3), "w": ones(4, 3)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": ones(5, 3)}),
        ("x", {"x": ones(2, 0, 3)}),
        ("x", {"x": ones(2, 5, 3, dtype=np.int32)}),
        ("w", {"w": ones(3, 4)}),
        ("w", {"w": ones(0, 3)}),
        ("initial_state", {"initial_state": ones(2, 4, 3)}),
        ("segment_ids", {"segment_ids": ones(2, 4, dtype=np.int32)}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("implementation", {"implementation": "conv"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        short_convolution(**GOOD | change)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    x, w = jnp.ones((BATCH, 64, WIDTH)), jnp.ones((TAPS, WIDTH))
    _, pullback = jax.vjp(lambda x, w: short_convolution(x, w)[0], x, w)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    # The state before the first token, too, and zeros for its tangent.
    assert kept <= x.size + w.size + 2 * BATCH * (TAPS - 1) * WIDTH
