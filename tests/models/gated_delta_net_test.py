"""Gated DeltaNet against a slow transcription of its paper."""

import jax.numpy as jnp
import numpy as np
import pytest

from models import delta_net, gated_delta_net
from tests.support.layers import (
    array,
    build_mixer,
    call,
    check_layer,
    count_parameters,
    delta_recurrence,
    initial_values,
    inputs,
    merge,
    queries_keys_values,
    rms,
    sigmoid,
    silu,
    softplus,
    weight,
)


@pytest.mark.parametrize(
    ("eigenvalue_range", "beta_max", "conv_width"),
    [((0, 1), 1, 4), ((-1, 1), 2, 4), ((0, 1), 1, 0)],
)
def test_gated_delta_net_computes_its_recurrence_gates_and_output(
    eigenvalue_range, beta_max, conv_width
):
    mixer = build_mixer(
        gated_delta_net, heads=2, eigenvalue_range=eigenvalue_range, conv_width=conv_width
    )

    def transcription(x_TD):
        q, k, v = queries_keys_values(mixer, x_TD, 2)
        dt = softplus(x_TD @ weight(mixer.dt) + array(mixer.dt_bias_H))
        alpha = np.exp(-np.exp(array(mixer.a_log_H)) * dt)
        beta = beta_max * sigmoid(x_TD @ weight(mixer.beta))
        o = delta_recurrence(q, k, v, beta, np.repeat(alpha[:, :, None], q.shape[-1], axis=2))
        normed = merge(rms(o, array(mixer.norm.scale)))
        return (normed * silu(x_TD @ weight(mixer.output_gate))) @ weight(mixer.output)

    assert mixer.key_size == 6 and mixer.value_size == 12
    check_layer(mixer, transcription)


def test_without_decay_gated_delta_net_is_delta_net_with_an_output_gate():
    gated = build_mixer(gated_delta_net, heads=2, expand_k=1.0, expand_v=1.0)
    plain = build_mixer(delta_net, heads=2)
    for name in ("query", "key", "value", "beta", "output"):
        getattr(plain, name).kernel[...] = getattr(gated, name).kernel[...]
    for name in ("conv_q", "conv_k", "conv_v"):
        getattr(plain, name).weight_WD[...] = getattr(gated, name).weight_WD[...]
    plain.norm.scale[...] = gated.norm.scale[...]
    gated.a_log_H[...] = jnp.full((2,), -40.0)  # alpha = exp(-exp(-40) ...) = 1
    x = inputs()
    # A gate that is the same for all channels, silu(1): feed it by a constant input channel of its
    # own.
    gated.output_gate.kernel[...] = jnp.zeros((16, 16)).at[0].set(1.0)
    for linear in (gated.query, gated.key, gated.value, gated.beta, gated.dt):
        linear.kernel[...] = linear.kernel[...].at[0].set(0.0)
    for linear in (plain.query, plain.key, plain.value, plain.beta):
        linear.kernel[...] = linear.kernel[...].at[0].set(0.0)
    x[:, :, 0] = 1.0
    np.testing.assert_allclose(
        call(gated, x), silu(np.float64(1.0)) * np.asarray(call(plain, x)), atol=1e-5
    )


def test_decays_start_as_published():
    a_log_H, dt_bias_H = initial_values(gated_delta_net, 1024, "a_log_H", "dt_bias_H", heads=256)
    assert 0 < np.exp(a_log_H).min() < 1 and 15 < np.exp(a_log_H).max() <= 16
    dt = softplus(dt_bias_H)
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 * 1.001


def test_published_sizes():
    width, key, value = 2048, 1536, 3072  # 1.3B: six heads of 256
    want = 6 * width**2 + 4 * (2 * key + value) + 2 * width * 6 + 2 * 6 + value // 6
    assert count_parameters(gated_delta_net, width, depth=1) == want
