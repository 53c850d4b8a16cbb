"""Diagonal convolution against the scan that defines it, and against the diagonal scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import diagonal_convolution, diagonal_scan
from ops.diagonal_convolution import examples
from ops.diagonal_convolution.xla import powers
from tests.contracts.ops import DOCUMENT, TOLERANCE, assert_close

BATCH, LENGTH, WIDTH, MODES = (
    examples.SHAPES["test"][name] for name in ("batch", "length", "width", "modes")
)
FORMS = ("real", "complex")


def case(form, length, seed=0, dtype="float32"):
    """Inputs and an initial state; of the factors some forget all, some hardly anything."""
    rng = np.random.default_rng(seed)
    modulus = rng.choice([0.0, 0.5, 0.9, 1 - 1e-3], (WIDTH, MODES))
    angle = rng.uniform(0, 2 * np.pi, modulus.shape)

    def number(*shape):
        parts = tuple(jnp.float32(rng.standard_normal(shape)) for _ in "ri")
        return parts if form == "complex" else parts[0]

    a = modulus * np.cos(angle), modulus * np.sin(angle)
    shape = {**examples.SHAPES["test"], "length": length}
    inputs = examples.inputs(shape, form, dtype, jax.random.key(seed))
    inputs["a"] = tuple(map(jnp.float32, a)) if form == "complex" else jnp.float32(a[0])
    return inputs, number(BATCH, WIDTH, MODES)


def as_number(parts):
    if isinstance(parts, tuple):
        return np.asarray(parts[0]) + 1j * np.asarray(parts[1])
    return np.asarray(parts)


def named(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, inputs, state):
    def call(inputs, state):
        return diagonal_convolution(**inputs, initial_state=state, implementation=implementation)

    (y, final), pullback = jax.vjp(call, inputs, state)
    keys = jax.random.split(jax.random.key(7), 3)
    dy = jax.random.normal(keys[0], y.shape, y.dtype)
    dfinal = jax.tree.map(lambda x: jax.random.normal(keys[1], x.shape), final)
    return {"y": y, "final state": final, "gradient": pullback((dy, dfinal))}


@pytest.mark.parametrize(
    ("length", "dtype", "given"),
    [
        (LENGTH, "float32", True),
        pytest.param(LENGTH, "float32", False, marks=pytest.mark.slow),
        pytest.param(1, "float32", True, marks=pytest.mark.slow),
        pytest.param(LENGTH, "bfloat16", True, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_values_states_and_gradients_equal_the_reference(form, length, dtype, given):
    inputs, state = case(form, length, dtype=dtype)
    state = state if given else None
    got, expected = (
        named(values_and_gradients(implementation, inputs, state))
        for implementation in ("xla", "reference")
    )
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert_close(name, got[name], value, TOLERANCE[str(value.dtype)])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("form", FORMS)
def test_parts_with_state_equal_the_whole(form, implementation):
    inputs, state = case(form, 2 * DOCUMENT, seed=1)
    call = jax.jit(functools.partial(diagonal_convolution, implementation=implementation))
    y, final = call(**inputs, initial_state=state)
    halves = []
    for u in jnp.split(inputs["u"], 2, axis=1):
        half, state = call(**inputs | {"u": u}, initial_state=state)
        halves.append(half)
    assert_close("y", jnp.concatenate(halves, axis=1), y)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        assert_close("final state", got, want)


@pytest.mark.parametrize("form", FORMS)
def test_it_reads_the_states_of_the_diagonal_scan(form):
    inputs, _ = case(form, DOCUMENT, seed=2)
    a, b, c = (as_number(inputs[name]) for name in "abc")

    def flat(x):
        x = jnp.asarray(x.reshape(*x.shape[:-2], -1))
        return (x.real, x.imag) if form == "complex" else x

    entered = flat(np.asarray(inputs["u"])[..., None] * b)
    h, _ = jax.jit(diagonal_scan)(flat(a), entered)
    want = np.real(c * as_number(h).reshape(BATCH, DOCUMENT, WIDTH, MODES)).sum(-1)
    assert_close("y", jax.jit(diagonal_convolution)(**inputs)[0], want)


@pytest.mark.parametrize("length", [1, 2, 50])
def test_powers_by_doubling_are_powers(length):
    factor = jnp.array([[0.5 + 0.8j, -0.3], [1.0, 0.0]])
    got = jax.jit(powers, static_argnums=1)(factor, length)
    want = np.asarray(factor)[..., None] ** np.arange(length)
    np.testing.assert_allclose(got, want, atol=1e-5)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {"u": ones(2, 5, 3), "a": ones(3, 4), "b": ones(3, 4), "c": ones(3, 4)}
PAIR = (ones(3, 4), ones(3, 4))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("u", {"u": ones(5, 3)}),
        ("u", {"u": ones(2, 0, 3)}),
        ("u", {"u": ones(2, 5, 3, dtype=np.int32)}),
        ("a", {"a": ones(4, 4)}),
        ("a", {"a": PAIR[:1] * 3}),
        ("b", {"b": ones(3, 5)}),
        ("b", {"a": PAIR}),
        ("c", {"a": PAIR, "b": PAIR}),
        ("c", {"c": ones(4)}),
        ("initial_state", {"initial_state": ones(2, 12)}),
        ("implementation", {"implementation": "pallas_tpu"}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} "):
        diagonal_convolution(**GOOD | change)


@pytest.mark.parametrize("given", [True, False])
def test_walking_in_reverse_is_walking_along_flipped_tokens(given):
    inputs, state = case("complex", LENGTH)
    state = state if given else None
    flipped = inputs | {"u": inputs["u"][:, ::-1]}
    y, final = diagonal_convolution(**flipped, initial_state=state, implementation="reference")
    expected = named({"y": y[:, ::-1], "final state": final})
    for implementation in ("reference", "xla"):
        got = diagonal_convolution(
            **inputs, initial_state=state, reverse=True, implementation=implementation
        )
        for name, value in named(dict(zip(("y", "final state"), got, strict=True))).items():
            assert_close(f"{name} of {implementation}", value, expected[name])
