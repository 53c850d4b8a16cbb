"""Layers as linear time-varying systems: the forms agree, and the framework's identities hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tables import equivalences
from experiments.tables.computations.linear_systems import (
    distances,
    matrix,
    quadratic,
    random_layer,
    taylor,
    walk,
)
from experiments.tables.computations.systems_of_layers import (
    LAYERS,
    System,
    attention_equations,
    attention_system,
    elu_equations,
    elu_queries_keys,
    scores,
)

SEED = 3


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "normalised" else pytest.mark.full)
        for name in LAYERS
    ],
)
def test_a_layer_is_its_linear_system_in_values_and_gradients(layer):
    found = distances(layer, SEED)
    for form in ("quadratic", "equations"):
        assert max(found[form].values()) < 1e-12, form
    # float32: sums of up to 12 x 12 products of order one.
    assert max(found["layer"].values()) < 5e-6


def random_system(states=5, length=6):
    rng = np.random.default_rng(SEED)
    shapes = [(length, 3), (length, states), (length, states, 3), (length, 2, states), (3, 2)]
    return System(*(rng.standard_normal(shape) for shape in shapes))


def test_the_matrix_has_products_of_the_decays_in_between():
    system = random_system()
    with jax.enable_x64(True):
        phi = np.asarray(jax.jit(matrix)(system))
        walked = np.asarray(jax.jit(walk)(system))
    want = np.zeros_like(phi)
    for i in range(6):
        for j in range(i + 1):
            decay = np.prod(system.decay_TN[j + 1 : i + 1], axis=0)
            want[i, j] = system.read_TEN[i] @ np.diag(decay) @ system.write_TNC[j]
        want[i, i] += system.skip_CE.T
    np.testing.assert_allclose(phi, want, atol=1e-13)
    np.testing.assert_allclose(np.einsum("ijec,jc->ie", want, system.input_TC), walked, atol=1e-12)


def test_states_that_are_never_read_change_nothing():
    system = random_system()
    more = system._replace(
        decay_TN=np.pad(system.decay_TN, ((0, 0), (0, 1)), constant_values=0.5),
        write_TNC=np.pad(system.write_TNC, ((0, 0), (0, 1), (0, 0)), constant_values=1.0),
        read_TEN=np.pad(system.read_TEN, ((0, 0), (0, 0), (0, 1))),
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(quadratic)(more), jax.jit(quadratic)(system), atol=1e-13)


def test_the_sum_of_scores_as_normaliser_is_linear_attention():
    law = LAYERS["linear"]
    with jax.enable_x64(True):
        params, x_TD, _ = random_layer(law.mixer, law.options, SEED).in_float64()

        @jax.jit
        def both(params, x_TD):
            q, k = elu_queries_keys(params, x_TD)
            eta_TH = jnp.sum(scores(q, k), axis=-1).T
            divided = attention_equations(params, x_TD, scores(q, k) / eta_TH.T[:, :, None])
            return walk(attention_system(params, x_TD, q, k, eta_TH)), divided

        want = elu_equations(params, x_TD)
        for got in both(params, x_TD):
            np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.slow
def test_more_taylor_features_are_nearer_to_softmax_attention():
    found = [taylor(degree, 0)["softmax"] for degree in (1, 2, 5)]
    assert [numbers["features"] for numbers in found] == [3, 6, 21]
    errors = [numbers["values_log10"] for numbers in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] < -3


def test_the_table_has_every_layer_and_the_features_of_its_degrees():
    assert set(equivalences.LAYERS.values()) == set(LAYERS)
    for degree, features in equivalences.DEGREES.items():
        assert features == (degree + 2) * (degree + 1) // 2
