"""Gated DeltaNet and KDA against slow transcriptions of their papers, and what connects them to
DeltaNet and GLA."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import delta_net, gated_delta_net, kda
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    call,
    check_layer,
    convolved,
    count_parameters,
    inputs,
    merge,
    rms,
    sigmoid,
    silu,
    softplus,
    unit,
    weight,
)


def queries_keys_values(mixer, x_TD, heads):
    def activated(linear, convolution):
        return silu(convolved(x_TD @ weight(linear), convolution)).reshape(len(x_TD), heads, -1)

    q, k = activated(mixer.query, mixer.conv_q), activated(mixer.key, mixer.conv_k)
    return unit(q), unit(k), activated(mixer.value, mixer.conv_v)


def recurrence(q, k, v, beta, alpha_THK):
    """(I - beta k^T k) Diag(alpha) S + beta k^T v, with matrices as the papers write them."""
    o = np.zeros_like(v)
    for h in range(q.shape[1]):
        S = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(len(q)):
            erase = np.eye(q.shape[-1]) - beta[t, h] * np.outer(k[t, h], k[t, h])
            S = erase @ np.diag(alpha_THK[t, h]) @ S + beta[t, h] * np.outer(k[t, h], v[t, h])
            o[t, h] = q[t, h] @ S / math.sqrt(q.shape[-1])
    return o


@pytest.mark.parametrize(("eigenvalue_range", "beta_max"), [((0, 1), 1), ((-1, 1), 2)])
def test_gated_delta_net_computes_its_recurrence_gates_and_output(eigenvalue_range, beta_max):
    mixer = build_mixer(gated_delta_net, heads=2, eigenvalue_range=eigenvalue_range)

    def transcription(x_TD):
        q, k, v = queries_keys_values(mixer, x_TD, 2)
        dt = softplus(x_TD @ weight(mixer.dt) + array(mixer.dt_bias_H))
        alpha = np.exp(-np.exp(array(mixer.a_log_H)) * dt)
        beta = beta_max * sigmoid(x_TD @ weight(mixer.beta))
        o = recurrence(q, k, v, beta, np.repeat(alpha[:, :, None], q.shape[-1], axis=2))
        normed = merge(rms(o, array(mixer.norm.scale)))
        return (normed * silu(x_TD @ weight(mixer.output_gate))) @ weight(mixer.output)

    assert mixer.key_size == 6 and mixer.value_size == 12
    check_layer(mixer, transcription)


def test_kda_computes_its_recurrence_gates_and_output():
    mixer = build_mixer(kda, heads=2)

    def transcription(x_TD):
        q, k, v = queries_keys_values(mixer, x_TD, 2)
        logits = (x_TD @ weight(mixer.dt_in) @ weight(mixer.dt_out)).reshape(q.shape) + array(
            mixer.dt_bias_HK
        )
        alpha = np.exp(-np.exp(array(mixer.a_log_H))[None, :, None] * softplus(logits))
        o = recurrence(q, k, v, sigmoid(x_TD @ weight(mixer.beta)), alpha)
        gate = x_TD @ weight(mixer.output_gate_in) @ weight(mixer.output_gate_out) + array(
            mixer.output_gate_out.bias
        )
        return (sigmoid(gate) * merge(rms(o, array(mixer.norm.scale)))) @ weight(mixer.output)

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


def initial(module, width, *names, **options):
    """The initial values of parameters, with their groups; under jit, so that the others are not
    computed."""
    shapes = nnx.eval_shape(
        lambda: module.Mixer(width, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)
    )
    assert {getattr(shapes, name).get_metadata()["group"] for name in names} == {"no_decay"}

    @jax.jit
    def values():
        mixer = module.Mixer(width, depth=2, rngs=nnx.Rngs(0), **FLOAT32, **options)
        return [getattr(mixer, name)[...] for name in names]

    return [np.asarray(value, np.float64) for value in values()]


def test_decays_start_as_published():
    a_log_H, dt_bias_H = initial(gated_delta_net, 1024, "a_log_H", "dt_bias_H", heads=256)
    assert 0 < np.exp(a_log_H).min() < 1 and 15 < np.exp(a_log_H).max() <= 16
    dt = softplus(dt_bias_H)
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 and 5e-2 < dt.max() <= 1e-1 * 1.001
    a_log_H, dt_bias_HK = initial(kda, 256, "a_log_H", "dt_bias_HK", heads=64)
    assert 1 <= np.exp(a_log_H).min() < 3 and 12 < np.exp(a_log_H).max() <= 16
    assert dt_bias_HK.shape == (64, 4) and np.ptp(dt_bias_HK, axis=1).min() > 0, "per channel"


def test_published_sizes():
    width, key, value = 2048, 1536, 3072  # 1.3B: six heads of 256
    want = 6 * width**2 + 4 * (2 * key + value) + 2 * width * 6 + 2 * 6 + value // 6
    assert count_parameters(gated_delta_net, width, depth=1) == want
    # KDA at d = 2048: 16 heads of 128; both low-rank maps have rank 128.
    rank_maps = 2 * (width * 128 + 128 * width) + width
    want = 4 * width**2 + rank_maps + 4 * 3 * width + width * 16 + 16 + width + 128
    assert count_parameters(kda, width, depth=1, heads=16) == want
