"""Dense scan: the op contract, its convolution, and the powers of matrices that it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dense_scan
from ops.dense_scan import examples
from ops.dense_scan.powers import krylov, krylov_kernel, power_less_one
from tests.contracts.ops import BATCH, LENGTH, OpContract, assert_close

SYSTEMS, SIZE, OUTPUTS = (
    examples.SHAPES["test"][name] for name in ("width", "state_size", "outputs")
)


def contractions(rng):
    """State matrices [D, N, N] of norm 1 (nothing is forgotten), of norm 0.9, and nilpotent."""
    matrices = [np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in range(SYSTEMS)]
    matrices[1] = 0.9 * matrices[1]
    matrices[2] = np.eye(SIZE, k=1)
    return np.stack(matrices)


class TestDenseScan(OpContract):
    variants = ("dense",)
    implementations = ("xla",)
    isolates = "chunk"
    op = staticmethod(dense_scan)
    examples = examples

    def inputs(self, key, variant, length, dtype):
        A = contractions(np.random.default_rng(int(jax.random.bits(key))))
        return super().inputs(key, variant, length, dtype) | {"A": jnp.asarray(A, jnp.float32)}

    def initial_state(self, key, variant):
        return jax.random.normal(key, (BATCH, SYSTEMS, SIZE))


@pytest.mark.parametrize("length", [LENGTH, pytest.param(1, marks=pytest.mark.full)])
def test_the_convolution_with_the_krylov_kernel_is_the_recurrence(length):
    inputs, _, _ = TestDenseScan().data("dense", length, seed=1)
    # Systems that forget: the transform's error is that of the largest output, and the gradient of
    # an A of norm 1 weighs the one of lag l by l.
    inputs["A"] = 0.8 * inputs["A"]

    def run(implementation, inputs):
        kernel = functools.partial(krylov_kernel, inputs["A"], inputs["B"], inputs["C"])
        return dense_scan(**inputs, kernel=kernel, implementation=implementation)

    @jax.jit
    def values_and_gradients(inputs):
        results = []
        for implementation in ("xla", "reference"):
            outputs, pullback = jax.vjp(functools.partial(run, implementation), inputs)
            names = dict(zip(("y", "final state"), outputs, strict=True))
            results.append(names | pullback(jax.tree.map(jnp.cos, outputs))[0])
        return results

    got, expected = values_and_gradients(inputs)
    for name, value in expected.items():
        assert_close(name, got[name], value)


@pytest.mark.parametrize("given", ["initial_state", "segment_ids"])
def test_a_kernel_is_left_alone_where_there_is_a_state_or_a_segment(given):
    inputs, state, ids = TestDenseScan().data("dense", 5)
    options = {given: {"initial_state": state, "segment_ids": ids}[given]}
    dense_scan(**inputs, **options, kernel=lambda length: pytest.fail("it was asked for"))


@pytest.mark.parametrize("length", [1, 5, pytest.param(50, marks=pytest.mark.slow)])
def test_krylov_vectors_and_kernels_by_doubling_equal_one_product_after_another(length):
    rng = np.random.default_rng(0)
    A, b, c = (
        jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32)
        for shape in ((2, 4, 4), (2, 4), (2, 3, 4))
    )
    vectors, vector = [], np.asarray(b, np.float64)
    for _ in range(length):
        vectors.append(vector)
        vector = np.einsum("dij,dj->di", A, vector)
    want = np.stack(vectors, axis=1)
    scale = np.abs(want).max()
    got = jax.jit(krylov, static_argnums=2)(A, b[:, None], length)[:, :, 0]
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)
    kernel = jax.jit(krylov_kernel, static_argnums=3)(A, b, c, length)
    np.testing.assert_allclose(kernel, np.einsum("dmn,dln->dml", c, want), atol=1e-5 * scale)


@pytest.mark.parametrize("exponent", [1, 7, 64])
def test_a_power_less_the_identity_keeps_the_digits_of_what_hardly_decays(exponent):
    E = 1e-2 * np.random.default_rng(0).standard_normal((2, 5, 5))
    E[:, 0], E[:, :, 0] = 0, 0
    want = np.linalg.matrix_power(np.eye(5) + E, exponent) - np.eye(5)
    E[:, 0, 0] = -1e-9  # 1 - 1e-9 is 1 in float32
    want[:, 0, 0] = -1e-9 * exponent
    got = jax.jit(power_less_one, static_argnums=1)(jnp.float32(E), exponent)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[:, 0, 0], want[:, 0, 0], rtol=1e-5)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"u": ones(2, 5, 3), "A": ones(3, 4, 4), "B": ones(3, 4), "C": ones(3, 2, 4)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("u", {"u": ones(5, 3)}),
        ("u", {"u": ones(2, 0, 3)}),
        ("u", {"u": ones(2, 5, 3, dtype=np.int32)}),
        ("A", {"A": ones(3, 4)}),
        ("A", {"A": ones(3, 4, 5)}),
        ("A", {"A": ones(3, 4, 4, dtype=np.complex64)}),
        ("B", {"B": ones(4, 4)}),
        ("C", {"C": ones(3, 4)}),
        ("C", {"C": ones(3, 2, 5)}),
        ("initial_state", {"initial_state": ones(2, 4, 3)}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("implementation", {"implementation": "pallas_tpu"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        dense_scan(**GOOD | change)
