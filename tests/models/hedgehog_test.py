"""Hedgehog's feature map, and its layer against a slow transcription of its paper."""

import jax.numpy as jnp
import numpy as np
import pytest

from models import hedgehog
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    normalised,
    project,
    rotated,
    weight,
)


@pytest.mark.parametrize("options", [{}, {"feature_map": "exp", "temperature": 0.5, "rope": False}])
def test_hedgehog_computes_its_attention(options):
    mixer = build_mixer(hedgehog, heads=2, **options)

    def phi(x, feature_map):
        y = options.get("temperature", 1.0) * (
            np.einsum("thk,hkj->thj", x, array(feature_map.weight_HKK)) + array(feature_map.bias_HK)
        )
        e = np.exp(np.concatenate((y, -y), axis=-1))
        return e if options.get("feature_map") == "exp" else e / e.sum(-1, keepdims=True)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        if options.get("rope", True):
            angle = np.arange(len(x_TD))[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
            q, k = rotated(q, angle), rotated(k, angle)
        return merge(normalised(phi(q, mixer.query_map), phi(k, mixer.key_map), v)) @ weight(
            mixer.output
        )

    check_layer(mixer, transcription)


def test_hedgehog_map_starts_as_a_sum_of_hyperbolic_cosines_and_is_symmetric():
    q, k = (
        jnp.asarray(x, jnp.float32)
        for x in np.random.default_rng(0).standard_normal((2, 1, 3, 2, 4))
    )
    exp = hedgehog.SoftmaxMimicry(2, 4, kind="exp", temperature=1.0, param_dtype=jnp.float32)
    scores = jnp.sum(exp(q) * exp(k), axis=-1)
    np.testing.assert_allclose(
        scores, 2 * np.cosh(np.asarray(q + k, np.float64)).sum(-1), rtol=1e-5
    )
    softmax = hedgehog.SoftmaxMimicry(
        2, 4, kind="softmax", temperature=1.0, param_dtype=jnp.float32
    )
    np.testing.assert_allclose(softmax(q).sum(-1), 1, rtol=1e-6)
    assert (np.asarray(softmax(1e4 * q)) >= 0).all() and np.isfinite(
        np.asarray(softmax(1e4 * q))
    ).all()
    np.testing.assert_allclose(softmax(-q), jnp.roll(softmax(q), 4, axis=-1), rtol=1e-6)
    flat = hedgehog.SoftmaxMimicry(2, 4, kind="softmax", temperature=0.0, param_dtype=jnp.float32)
    np.testing.assert_allclose(flat(q), 1 / 8, rtol=1e-6)


def test_hedgehog_maps_add_half_a_percent_to_a_seven_billion_parameter_model():
    added = count_parameters(hedgehog, 4096, depth=32, heads=32) - 4 * 4096**2
    assert added == 2 * 32 * (128**2 + 128)
    assert 32 * added / 6.74e9 == pytest.approx(0.005, abs=2e-4)
