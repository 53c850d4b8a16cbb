"""The LRU against a slow complex transcription of its paper, and what its initialisation
promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lru
from tests.support.layers import FLOAT32, array, build_mixer, check_layer, sigmoid, weight


def complex_weight(real, imaginary):
    return weight(real) + 1j * weight(imaginary)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_lru_computes_its_recurrence_and_block():
    mixer = build_mixer(lru, state_size=5)

    def transcription(x_TD):
        factor = np.exp(-np.exp(array(mixer.decay_log_N)) + 1j * np.exp(array(mixer.angle_log_N)))
        B = complex_weight(mixer.write_real, mixer.write_imaginary).T
        C = complex_weight(mixer.read_real, mixer.read_imaginary).T
        h, y = np.zeros(5, complex), np.zeros_like(x_TD)
        for t, x in enumerate(x_TD):
            h = factor * h + np.exp(array(mixer.scale_log_N)) * (B @ x)
            y[t] = (C @ h).real + array(mixer.skip_D) * x
        value, gate = (
            gelu(y) @ weight(m) + array(m.bias) for m in (mixer.output, mixer.output_gate)
        )
        return value * sigmoid(gate)

    check_layer(mixer, transcription)


def test_the_ring_is_filled_evenly_and_states_of_white_noise_have_variance_one():
    r_min, r_max, max_phase, states = 0.5, 0.99, math.pi / 10, 20_000
    options = {"r_min": r_min, "r_max": r_max, "max_phase": max_phase, "state_size": states}
    mixer = lru.Mixer(1, depth=1, rngs=nnx.Rngs(0), **FLOAT32, **options)
    real, imaginary = (np.asarray(part, np.float64) for part in mixer.factor())
    square, angle = real**2 + imaginary**2, np.arctan2(imaginary, real)
    for values, low, high in ((square, r_min**2, r_max**2), (angle, 0, max_phase)):
        assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        # 0.12 is 5 standard deviations.
        np.testing.assert_allclose(counts, states / 10, rtol=0.12)
    # The variance of h for B x of variance one.
    gain = np.exp(2 * array(mixer.scale_log_N)) / (1 - square)
    # 1 - 0.99^2 in float32 angles and moduli.
    np.testing.assert_allclose(gain, 1, rtol=1e-4)


@pytest.mark.parametrize("r_min", [0.0, 0.9])
def test_the_ring_may_touch_the_unit_circle(r_min):
    mixer = lru.Mixer(
        1, depth=1, rngs=nnx.Rngs(1), **FLOAT32, r_min=r_min, r_max=1.0, state_size=20_000
    )
    for parameter in (mixer.decay_log_N, mixer.angle_log_N, mixer.scale_log_N):
        assert np.isfinite(array(parameter)).all()


def test_no_step_of_the_optimizer_can_make_the_recurrence_unstable():
    mixer = build_mixer(lru, state_size=4)
    mixer.decay_log_N[...] = jnp.array([-1e4, -20.0, 0.0, 4.0])
    real, imaginary = mixer.factor()
    modulus = jnp.hypot(real, imaginary)
    # cos^2 + sin^2 is one up to rounding.
    assert (modulus <= 1 + 1e-7).all() and modulus[2] < 1 and modulus[3] < 1e-20
    gradients = jax.jit(jax.grad(lambda mixer, x: jnp.sum(mixer(x)[0] ** 2)))(
        mixer, jnp.ones((1, 7, 16))
    )
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_min": 0.9, "r_max": 0.5}, "0 <= r_min < r_max <= 1; got 0.9 and 0.5"),
        ({"max_phase": 7.0}, "got 7.0"),
    ],
)
def test_the_lru_refuses_rings_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(lru, **options)
