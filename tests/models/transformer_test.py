"""Softmax attention against a slow transcription of its paper."""

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from tests.support.layers import BATCH, LENGTH, build_mixer, check_window_attention, inputs


def test_attention_is_softmax_over_the_context():
    options = {"context_length": LENGTH, "qk_norm": True}
    check_window_attention(transformer, options, LENGTH)


def test_rotary_attention_sees_differences_of_positions_only():
    mixer = build_mixer(transformer, context_length=LENGTH, heads=2)
    x = inputs()
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (BATCH, LENGTH))
    call = jax.jit(lambda mixer, x, positions: mixer(x, positions=positions))
    want, _ = call(mixer, x, positions)
    got, state = call(mixer, x, positions + 1000)
    # Float32 angles near 1000 carry 1000 * 2^-24 each.
    np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_array_equal(state["position"], 1000 + LENGTH)
