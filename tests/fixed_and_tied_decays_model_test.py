"""RetNet, HGRN2 and Lightning Attention against slow transcriptions of their papers, and their decays."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import hgrn2, retnet
from tests.layer_check import (
    FLOAT32,
    array,
    build_mixer,
    check_layer,
    count_parameters,
    merge,
    project,
    rms,
    rotated,
    sigmoid,
    silu,
    weight,
)


def test_retnet_computes_its_recurrence_and_output():
    mixer = build_mixer(retnet, heads=2)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        o = np.zeros_like(v)
        for h, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
            S = np.zeros((8, 16))
            for t in range(len(x_TD)):
                angle = t * 10000.0 ** (-np.arange(4) / 4)
                S = gamma * S + np.outer(rotated(k[t, h], angle), v[t, h])
                o[t, h] = rotated(q[t, h], angle) @ S / math.sqrt(8)
        return (silu(x_TD @ weight(mixer.output_gate)) * merge(rms(o))) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_retnet_has_eight_squares_of_its_width():
    assert count_parameters(retnet, 2048, depth=24, heads=8) == 8 * 2048**2


@pytest.mark.parametrize("layer", [0, 1])
def test_hgrn2_computes_its_recurrence(layer):
    mixer = build_mixer(hgrn2, heads=2, layer=layer)

    def transcription(x_TD):
        q, z, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.forget, mixer.value))
        bound = sigmoid(array(mixer.bound_D)).reshape(2, 8) if layer else np.zeros((2, 8))
        f = bound + (1 - bound) * sigmoid(z)
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((8, 8))
            for t in range(len(x_TD)):
                S = np.diag(f[t, h]) @ S + np.outer(1 - f[t, h], v[t, h])
                o[t, h] = silu(q[t, h]) @ S
        return rms(merge(o), array(mixer.norm.scale)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_hgrn2_forgets_at_most_to_a_bound_that_starts_at_the_layers_place_in_the_network():
    logits = jnp.broadcast_to(jnp.linspace(-1e4, 1e4, 41)[None, :, None], (1, 41, 4))
    for layer in range(4):
        mixer = hgrn2.Mixer(4, depth=4, layer=layer, heads=1, rngs=nnx.Rngs(0), **FLOAT32)
        f_log, k = (np.asarray(x, np.float64) for x in mixer.gate(logits))
        assert np.isfinite(f_log).all() and (f_log <= 0).all() and (k >= 0).all()
        np.testing.assert_allclose(np.exp(f_log) + k, 1, atol=1e-6)
        assert np.exp(f_log).min() == pytest.approx(layer / 4, abs=1e-6)


def test_hgrn2_has_four_squares_of_its_width():
    assert count_parameters(hgrn2, 2048, depth=24, layer=3, heads=16) == 4 * 2048**2 + 2 * 2048
