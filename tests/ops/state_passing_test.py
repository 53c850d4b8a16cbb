"""State passing against the recurrence written out in numpy; its backward pass against JAX's."""

import jax
import numpy as np
import pytest

from ops import state_passing
from ops.state_passing import examples
from tests.contracts.ops import assert_close

SHAPE = {**examples.SHAPES["test"], "length": 5}
BATCH, PARTS, SYSTEMS, SIZE = (SHAPE[name] for name in ("batch", "length", "systems", "state"))


def data(seed=0):
    rng = np.random.default_rng(seed)
    keeps = rng.random((BATCH, PARTS)) < 0.7
    assert keeps.any() and not keeps.all()
    inputs = examples.inputs(SHAPE, "", "float32", jax.random.key(seed))
    state = rng.standard_normal((BATCH, SYSTEMS, SIZE)).astype(np.float32)
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    return {**arrays, "keeps": keeps, "initial_state": state}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_it_is_the_recurrence(implementation):
    given = data()
    S, before = given["initial_state"].astype(np.float64), []
    for t in range(PARTS):
        before.append(S)
        kept = np.einsum("dnk,bdk->bdn", given["A"].astype(np.float64), S)
        kept = kept * given["keeps"][:, t, None, None]
        S = kept + given["written"][:, t]
    got = state_passing(**given, implementation=implementation)
    assert_close("before", got[0], np.stack(before, axis=1))
    assert_close("last", got[1], S)


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_equal_those_of_jax(packed):
    given = data(1)
    keeps = given.pop("keeps")
    cotangents = data(2)["written"], data(3)["initial_state"]

    def gradients(implementation):
        def call(given):
            return state_passing(
                **given, keeps=keeps if packed else None, implementation=implementation
            )

        return jax.vjp(call, given)[1](cotangents)[0]

    expected = gradients("reference")
    for name, gradient in gradients(None).items():
        assert np.abs(expected[name]).max() > 0.1
        assert_close(name, gradient, expected[name])


def test_without_a_state_it_starts_from_zeros():
    given = data() | {"initial_state": None}
    zeros = np.zeros((BATCH, SYSTEMS, SIZE), np.float32)
    expected = state_passing(**given | {"initial_state": zeros})
    for got, wanted in zip(state_passing(**given), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A", np.ones((SYSTEMS, SIZE), np.float32)),
        ("A", np.ones((SYSTEMS, SIZE, SIZE), np.complex64)),
        ("written", np.ones((BATCH, 0, SYSTEMS, SIZE), np.float32)),
        ("written", np.ones((BATCH, SYSTEMS, SIZE), np.float32)),
        ("keeps", np.ones((BATCH, PARTS), np.float32)),
        ("keeps", np.ones((PARTS, BATCH), bool)),
        ("initial_state", np.ones((BATCH, SIZE, SYSTEMS), np.float32)),
        ("implementation", "chunked"),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"^{name} "):
        state_passing(**data() | {name: value})
