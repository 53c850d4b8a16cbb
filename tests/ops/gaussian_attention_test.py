"""Gaussian-kernel attention: Newton's inverse against its closed form, also where it does not
converge, and what the kernel implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import gaussian_attention
from ops.gaussian_attention import examples, xla
from tests.contracts.ops import TOLERANCE, assert_close

BATCH, HEADS, KEY, VALUE = (
    examples.SHAPES["test"][name] for name in ("batch", "heads", "key", "value")
)
attend = jax.jit(gaussian_attention, static_argnames=("iterations", "implementation", "normalise"))


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def data(length=50, landmarks=9, dtype="float32", width=1.5):
    """q, landmarks (tokens of it) and v; the entries of q are of size `width`."""
    shape = {**examples.SHAPES["test"], "length": length, "landmarks": landmarks}
    arrays = examples.inputs(shape, "", "float32", jax.random.key(0))
    sizes = {"q": 2 * width, "landmarks": 2 * width, "v": 1}
    return tuple((size * arrays[name]).astype(dtype) for name, size in sizes.items())


def values_and_gradients(implementation, arrays, **options):
    def call(*arrays):
        return gaussian_attention(*arrays, **options, implementation=implementation)

    @jax.jit
    def run(*arrays):
        (o, residual), pullback = jax.vjp(call, *arrays)
        cotangents = normal(2, *o.shape, dtype=o.dtype), jnp.ones_like(residual)
        return o, residual, *pullback(cotangents)

    names = ("o", "residual", "dq", "dlandmarks", "dv")
    return dict(zip(names, run(*arrays), strict=True))


def check(arrays, **options):
    expected, got = (values_and_gradients(x, arrays, **options) for x in ("reference", "xla"))
    # Both stop at rounding, where the residual is rounding alone.
    np.testing.assert_allclose(got.pop("residual"), expected.pop("residual"), atol=1e-5)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert_close(name, got[name], expected[name], TOLERANCE[str(got[name].dtype)])
    return got


NORMALISE = pytest.mark.parametrize(
    "normalise", [pytest.param(False, marks=pytest.mark.full), True]
)


@NORMALISE
@pytest.mark.parametrize(
    ("length", "landmarks", "dtype"), [(50, 9, "float32"), (1, 1, "float32"), (50, 9, "bfloat16")]
)
def test_values_and_gradients_equal_the_reference(length, landmarks, dtype, normalise):
    check(data(length, landmarks, dtype), normalise=normalise)


IDS = jnp.asarray([[7] * 23 + [3] * 27, [7] * 40 + [3] * 10])
LANDMARK_IDS = jnp.asarray([[7] * 4 + [3] * 4 + [-1], [7] * 8 + [3]])  # one is not there


@pytest.mark.slow
@NORMALISE
def test_masked_and_packed_ones_too(normalise):
    mask = jnp.asarray(np.random.default_rng(3).random((BATCH, 50)) < 0.7)
    check(data(), normalise=normalise, key_mask=mask)
    ids = {"documents": IDS, "landmark_documents": LANDMARK_IDS}
    check(data(), normalise=normalise, key_mask=mask, jitter=0.01, **ids)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("iterations", [3, 20])
def test_packed_documents_equal_separate_ones(iterations, implementation):
    q, landmarks, v = data()
    options = {"iterations": iterations, "implementation": implementation}
    packed = {"documents": IDS, "landmark_documents": LANDMARK_IDS}
    o, residual = attend(q, landmarks, v, **packed, **options)
    first, of_first = attend(q[:1, :23], landmarks[:1, :4], v[:1, :23], **options)
    second, of_second = attend(q[:1, 23:], landmarks[:1, 4:8], v[:1, 23:], **options)
    assert_close("o", o[:1], jnp.concatenate([first, second], axis=1))
    alone = attend(q[:1, :1], landmarks[:1, 8:], v[:1, :1], **options)[1]
    largest = jnp.maximum(jnp.maximum(of_first, of_second), alone)
    np.testing.assert_allclose(residual[:1], largest, atol=1e-6)


def test_what_a_mask_hides_changes_nothing():
    q, landmarks, v = data()
    mask = jnp.asarray(np.random.default_rng(3).random((BATCH, 50)) < 0.7)
    hide = mask[:, :, None, None]
    hidden = (jnp.where(hide, q, jnp.nan), landmarks, jnp.where(hide, v, jnp.nan))
    got, want = (values_and_gradients("xla", x, key_mask=mask) for x in (hidden, (q, landmarks, v)))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    nothing = values_and_gradients("xla", (q, landmarks, v), key_mask=jnp.zeros_like(mask))
    for name in ("o", "dq", "dlandmarks", "dv"):
        np.testing.assert_array_equal(nothing[name], 0.0, err_msg=name)


def closed_form(A, iterations):
    """The Newton iterate in float64 by eigenvalues."""
    A = np.asarray(A, np.float64)
    values, vectors = np.linalg.eigh(A)
    first = 1.8 / A.sum(-1).max() ** 2
    iterate = (1 - (1 - first * values**2) ** (2.0**iterations)) / values
    return (vectors * iterate) @ vectors.T


@pytest.mark.parametrize("iterations", [1, 4, 9, 20])
def test_the_iterate_is_the_closed_form_and_its_residual_falls(iterations):
    x = 1.5 * normal(0, 12, KEY)
    A = jnp.exp(-0.5 * KEY**-0.5 * ((x[:, None] - x[None]) ** 2).sum(-1))
    (Y, error), (_, before) = (
        xla.newton_inverse(A[None, None], None, n) for n in (iterations, iterations - 1)
    )
    want = closed_form(A, iterations)
    # Rounding of a step grows with the condition of A.
    tolerance = 6e-8 * np.linalg.cond(np.asarray(A, np.float64)) * 10
    assert_close("iterate", Y[0, 0], want, tolerance)
    wide = np.asarray(A, np.float64)
    residual = np.linalg.norm(wide @ want @ wide - wide) / np.linalg.norm(wide)
    np.testing.assert_allclose(error, residual, rtol=1e-3, atol=3e-6)
    assert (error <= before).all()


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [20, 200])
def test_landmarks_that_agree_are_reported_and_never_nan(iterations):
    """Of rank one, or nearly; Newton's iteration alone doubles what rounding leaves in the null
    space and overflows."""
    q, _, v = data()
    equal = jnp.broadcast_to(q[:, :1], (BATCH, 9, HEADS, KEY))
    nearly = equal + 1e-4 * normal(5, *equal.shape)
    A = jnp.ones((1, 1, 9, 9)) + 1e-7 * normal(6, 1, 1, 9, 9)
    Y = 1.8 * A / 81
    for _ in range(200):
        Y = 2 * Y - Y @ A @ Y
    assert not np.isfinite(Y).all()
    for landmarks in (equal, nearly):
        got = values_and_gradients("xla", (q, landmarks, v), iterations=iterations)
        assert all(np.isfinite(x).all() for x in got.values())
        assert (got["residual"] < 1e-3).all()


def test_an_inverse_that_has_not_converged_says_so():
    _, residual = attend(*data(width=0.5), iterations=2)
    assert (residual > 0.1).all()
    _, residual = attend(*data(width=0.5), iterations=20)
    assert (residual < 1e-5).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_tokens_as_landmarks_give_the_kernel_itself(implementation):
    q, _, v = data(length=16)
    o, _ = attend(q, q, v, iterations=30, implementation=implementation)
    x = np.asarray(q, np.float64)
    S = np.exp(-0.5 * KEY**-0.5 * ((x[:, :, None] - x[:, None]) ** 2).sum(-1))
    assert_close("o", o, np.einsum("btsh,bshv->bthv", S, np.asarray(v, np.float64)), 2e-5)


def test_one_landmark_is_an_outer_product():
    q, landmarks, v = data(landmarks=1)
    p = jnp.exp(-0.5 * KEY**-0.5 * ((q - landmarks) ** 2).sum(-1))[..., None]
    o, _ = attend(q, landmarks, v)
    assert_close("o", o, p * (p * v).sum(1, keepdims=True))


def test_equal_tokens_sum_values_and_normalised_do_not_grow_with_their_number():
    q = jnp.broadcast_to(normal(0, BATCH, 1, HEADS, KEY), (BATCH, 50, HEADS, KEY))
    v = normal(1, BATCH, 50, HEADS, VALUE)
    total = jnp.broadcast_to(v.sum(1, keepdims=True), v.shape)
    o, _ = attend(q, q[:, :4], v)
    assert_close("o", o, total, 2e-5)
    o, _ = attend(q, q[:, :4], v, normalise=True)
    assert_close("normalised o", o, total / 4, 2e-5)


def test_a_common_shift_changes_nothing():
    q, landmarks, v = data()
    o, _ = attend(q, landmarks, v)
    # Exact in float32: multiples of 2^-10 and a power of two.
    q, landmarks = (jnp.round(x * 1024) / 1024 for x in (q, landmarks))
    o, _ = attend(q, landmarks, v)
    moved, _ = attend(q + 64.0, landmarks + 64.0, v)
    assert_close("o", moved, o)


def test_the_gradient_is_that_of_an_inverse():
    """Where it has converged: by differences in float64."""
    arrays = data(length=12, landmarks=4)
    got = values_and_gradients("xla", arrays, iterations=30)
    cotangent = np.asarray(normal(2, BATCH, 12, HEADS, VALUE), np.float64)

    def loss(landmarks):
        q, v = (np.asarray(x, np.float64) for x in (arrays[0], arrays[2]))

        def kernel(x, y):
            squares = ((x[:, :, None] - y[:, None]) ** 2).sum(-1)
            return np.exp(-0.5 * KEY**-0.5 * np.moveaxis(squares, 3, 1))

        A, P = kernel(landmarks, landmarks), kernel(landmarks, q)
        o = np.einsum("bhmt,bhmn,bhns,bshv->bthv", P, np.linalg.inv(A), P, v)
        return (o * cotangent).sum()

    landmarks = np.asarray(arrays[1], np.float64)
    direction = np.random.default_rng(7).standard_normal(landmarks.shape)
    step = 1e-5
    want = (loss(landmarks + step * direction) - loss(landmarks - step * direction)) / (2 * step)
    along = (np.asarray(got["dlandmarks"], np.float64) * direction).sum()
    np.testing.assert_allclose(along, want, rtol=1e-4)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    arrays = data(256, 9)
    _, pullback = jax.vjp(lambda *x: gaussian_attention(*x)[0], *arrays)
    kept = sum(residual.size for residual in jax.tree.leaves(pullback))
    assert kept <= sum(x.size for x in arrays)


def test_an_empty_batch_has_empty_outputs():
    got = values_and_gradients("xla", tuple(x[:0] for x in data()))
    assert got["o"].shape == (0, 50, HEADS, VALUE) and got["residual"].shape == (0, HEADS)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"q": ones(2, 5, 4, 8), "landmarks": ones(2, 3, 4, 8), "v": ones(2, 5, 4, 6)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": ones(2, 5, 8)}),
        ("landmarks", {"landmarks": ones(2, 0, 4, 8)}),
        ("landmarks", {"landmarks": ones(2, 3, 2, 8)}),
        ("v", {"v": ones(2, 4, 4, 6)}),
        ("scale", {"scale": 0.0}),
        ("iterations", {"iterations": 0}),
        ("jitter", {"jitter": -0.01}),
        ("key_mask", {"key_mask": ones(2, 5)}),
        ("documents", {"documents": ones(2, 5), "landmark_documents": ones(2, 3, dtype=np.int32)}),
        ("landmark_documents", {"documents": ones(2, 5, dtype=np.int32)}),
        ("landmark_documents", {"landmark_documents": ones(2, 3, dtype=np.int32)}),
        ("implementation", {"implementation": "chunked"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        gaussian_attention(**GOOD | change)
