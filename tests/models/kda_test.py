"""KDA against a slow transcription of its report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gated_delta_net, kda
from tests.support.layers import (
    array,
    build_mixer,
    check_layer,
    count_parameters,
    delta_recurrence,
    initial_values,
    inputs,
    merge,
    queries_keys_values,
    rms,
    sigmoid,
    softplus,
    weight,
)


@pytest.mark.parametrize("conv_width", [4, 0])
def test_kda_computes_its_recurrence_gates_and_output(conv_width):
    mixer = build_mixer(kda, heads=2, conv_width=conv_width)

    def transcription(x_TD):
        q, k, v = queries_keys_values(mixer, x_TD, 2)
        logits = (x_TD @ weight(mixer.dt_in) @ weight(mixer.dt_out)).reshape(q.shape) + array(
            mixer.dt_bias_HK
        )
        alpha = np.exp(-np.exp(array(mixer.a_log_H))[None, :, None] * softplus(logits))
        o = delta_recurrence(q, k, v, sigmoid(x_TD @ weight(mixer.beta)), alpha)
        gate = x_TD @ weight(mixer.output_gate_in) @ weight(mixer.output_gate_out) + array(
            mixer.output_gate_out.bias
        )
        return (sigmoid(gate) * merge(rms(o, array(mixer.norm.scale)))) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_kda_with_equal_channels_forgets_like_gated_delta_net():
    vector, scalar = (
        build_mixer(kda, heads=2),
        build_mixer(gated_delta_net, heads=2, expand_k=1.0, expand_v=1.0),
    )
    for name in ("query", "key", "value", "beta"):
        getattr(scalar, name).kernel[...] = getattr(vector, name).kernel[...]
    for name in ("conv_q", "conv_k", "conv_v"):
        getattr(scalar, name).weight_WD[...] = getattr(vector, name).weight_WD[...]
    scalar.a_log_H[...] = vector.a_log_H[...]
    scalar.dt_bias_H[...] = jnp.array([0.3, -0.5])
    vector.dt_bias_HK[...] = jnp.broadcast_to(jnp.array([0.3, -0.5])[:, None], (2, 8))
    scalar.dt.kernel[...] = jnp.zeros((16, 2))
    vector.dt_out.kernel[...] = jnp.zeros_like(vector.dt_out.kernel[...])
    run = jax.jit(lambda mixer, x: mixer(x)[1]["memory"])
    np.testing.assert_allclose(run(vector, inputs()), run(scalar, inputs()), atol=1e-5)


def test_decays_start_as_published():
    a_log_H, dt_bias_HK = initial_values(kda, 256, "a_log_H", "dt_bias_HK", heads=64)
    assert 1 <= np.exp(a_log_H).min() < 3 and 12 < np.exp(a_log_H).max() <= 16
    assert dt_bias_HK.shape == (64, 4) and np.ptp(dt_bias_HK, axis=1).min() > 0, "per channel"


def test_published_sizes():
    width = 2048
    # KDA at d = 2048: 16 heads of 128; both low-rank maps have rank 128.
    rank_maps = 2 * (width * 128 + 128 * width) + width
    want = 4 * width**2 + rank_maps + 4 * 3 * width + width * 16 + 16 + width + 128
    assert count_parameters(kda, width, depth=1, heads=16) == want
