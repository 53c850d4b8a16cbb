"""Long convolution against its defining sum, numpy's convolution and the recurrence that it is the
parallel form of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import long_convolution
from ops.long_convolution import examples
from tests.contracts.ops import TOLERANCE, assert_close

BATCH, LENGTH, WIDTH = (examples.SHAPES["test"][name] for name in ("batch", "length", "width"))
convolve = jax.jit(long_convolution, static_argnames="implementation")


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@jax.jit
def values_and_gradients(u, kernel, dy, segment_ids=None):
    def of(implementation):
        def call(u, kernel):
            return long_convolution(
                u, kernel, segment_ids=segment_ids, implementation=implementation
            )

        y, pullback = jax.vjp(call, u, kernel)
        return dict(zip(("y", "du", "dkernel"), (y, *pullback(dy.astype(y.dtype))), strict=True))

    return of("xla"), of("reference")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        (1, "float32"),
        (LENGTH, "float32"),
        pytest.param(2, "float32", marks=pytest.mark.full),
        pytest.param(64, "float32", marks=pytest.mark.full),
        pytest.param(LENGTH, "bfloat16", marks=pytest.mark.full),
    ],
)
def test_values_and_gradients_equal_the_reference(length, dtype, packed):
    shape = {**examples.SHAPES["test"], "length": length}
    inputs = examples.inputs(shape, "", dtype, jax.random.key(0))
    u, kernel, ids = inputs["u"], inputs["kernel"], None
    if packed:  # ids come back: only a change counts
        starts = np.random.default_rng(3).random((BATCH, length)) < 0.06
        ids = jnp.asarray(np.cumsum(starts, axis=1) % 3)
    got, expected = values_and_gradients(u, kernel, normal(2, *u.shape), ids)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert_close(name, got[name], expected[name], TOLERANCE[str(got[name].dtype)])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_documents_equal_separate_ones(implementation):
    length, rows = 83, ((0, 30, 31, 83), (0, 64, 70, 83))
    u, kernel = normal(0, len(rows), length, WIDTH), normal(1, WIDTH, length)
    ids, expected = np.zeros((len(rows), length), np.int32), np.zeros(u.shape)
    for row, cuts in enumerate(rows):
        for document, (a, b) in enumerate(itertools.pairwise(cuts)):
            ids[row, a:b] = (5, 0, 5)[document]
            expected[row, a:b] = long_convolution(
                u[row : row + 1, a:b], kernel[:, : b - a], implementation="reference"
            )[0]
    got = convolve(u, kernel, segment_ids=ids, implementation=implementation)
    assert_close("y", got, expected)


def test_rows_may_have_kernels_of_their_own():
    u, kernel = normal(0, BATCH, 9, WIDTH), normal(1, BATCH, WIDTH, 9)
    got, reference = values_and_gradients(u, kernel, normal(2, *u.shape))
    for name in reference:
        assert_close(name, got[name], reference[name])
    for b in range(BATCH):
        assert_close("y", got["y"][b : b + 1], convolve(u[b : b + 1], kernel[b]))


def test_it_is_numpys_convolution_cut_to_the_length():
    u, kernel = normal(0, BATCH, LENGTH, WIDTH), normal(1, WIDTH, LENGTH)
    y = convolve(u, kernel)
    for b in range(BATCH):
        for d in range(WIDTH):
            expected = np.convolve(
                np.asarray(u[b, :, d], np.float64), np.asarray(kernel[d], np.float64)
            )
            assert_close(f"y[{b}, :, {d}]", y[b, :, d], expected[:LENGTH])


def test_the_last_token_does_not_wrap_around_to_the_first():
    u = jnp.zeros((1, LENGTH, 1)).at[0, -1].set(1.0)
    y = convolve(u, normal(1, 1, LENGTH))
    np.testing.assert_allclose(y[0, :-1], 0, atol=1e-6)


def test_the_kernel_of_a_recurrence_gives_its_outputs():
    factor = jnp.linspace(-0.9, 0.99, WIDTH)
    u, h, expected = np.asarray(normal(0, BATCH, LENGTH, WIDTH)), 0.0, []
    for t in range(LENGTH):
        h = np.asarray(factor) * h + u[:, t]
        expected.append(h)
    kernel = factor[:, None] ** jnp.arange(LENGTH)[None, :]
    assert_close("y", convolve(jnp.asarray(u), kernel), np.stack(expected, axis=1))


def test_only_the_inputs_are_kept_for_the_backward_pass():
    u, kernel = jnp.ones((BATCH, 64, WIDTH)), jnp.ones((WIDTH, 64))
    _, pullback = jax.vjp(long_convolution, u, kernel)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    assert kept <= u.size + kernel.size


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"u": ones(2, 5, 3), "kernel": ones(3, 5)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("u", {"u": ones(5, 3)}),
        ("u", {"u": ones(2, 0, 3)}),
        ("u", {"u": ones(2, 5, 3, dtype=np.int32)}),
        ("kernel", {"kernel": ones(5, 3)}),
        ("kernel", {"kernel": ones(3, 4)}),
        ("kernel", {"kernel": ones(3, 5, dtype=np.complex64)}),
        ("kernel", {"kernel": ones(1, 3, 5)}),
        ("kernel", {"kernel": ones(2, 3, 5), "segment_ids": np.ones((2, 5), np.int32)}),
        ("segment_ids", {"segment_ids": ones(2, 5)}),
        ("segment_ids", {"segment_ids": ones(5, dtype=np.int32)}),
        ("implementation", {"implementation": "chunked"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        long_convolution(**GOOD | change)
