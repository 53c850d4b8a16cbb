"""Linear attention, GLA, DeltaNet, Mamba and softmax attention against slow transcriptions of their
papers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import delta_net, gla, linear_attention, mamba, transformer, window_attention
from tests.support.layers import (
    BATCH,
    FLOAT32,
    LENGTH,
    WIDTH,
    array,
    build_mixer,
    check_layer,
    convolved,
    inputs,
    merge,
    project,
    rms,
    sigmoid,
    silu,
    softplus,
    unit,
    weight,
)


def test_linear_attention_computes_equations_18_to_20():
    mixer = build_mixer(linear_attention, heads=2)

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(x))  # elu(x) + 1

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        o = np.zeros_like(v)
        for h in range(2):
            S, z = np.zeros((8, 8)), np.zeros(8)
            for t in range(len(x_TD)):
                S += np.outer(phi(k[t, h]), v[t, h])
                z += phi(k[t, h])
                o[t, h] = phi(q[t, h]) @ S / (phi(q[t, h]) @ z)
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_linear_attention_without_denominator_normalises_each_head():
    mixer = build_mixer(
        linear_attention, heads=2, feature_map="identity", normaliser="rms_norm", expand_k=0.5
    )

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        scores = np.einsum("thk,shk->hts", q, k) / math.sqrt(q.shape[-1])
        o = np.einsum("hts,shv->thv", np.tril(scores), v)
        return merge(rms(o, array(mixer.norm.scale))) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_gla_computes_its_recurrence_gate_and_output():
    mixer = build_mixer(gla, heads=2, gate_rank=3)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        logits = x_TD @ weight(mixer.gate_in) @ weight(mixer.gate_out) + array(mixer.gate_out.bias)
        alpha = (sigmoid(logits) ** (1 / 16)).reshape(len(x_TD), 2, -1)
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((4, 8))  # K = 16 / 2 / 2, V = 16 / 2
            for t in range(len(x_TD)):
                S = np.diag(alpha[t, h]) @ S + np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(4)
        normed = merge(rms(o, array(mixer.norm.scale)))
        return (silu(x_TD @ weight(mixer.output_gate)) * normed) @ weight(mixer.output)

    check_layer(mixer, transcription)


@pytest.mark.parametrize("conv_width", [0, 4])
@pytest.mark.parametrize(("eigenvalue_range", "beta_max"), [((0, 1), 1), ((-1, 1), 2)])
def test_delta_net_computes_its_recurrence(conv_width, eigenvalue_range, beta_max):
    mixer = build_mixer(
        delta_net, heads=2, conv_width=conv_width, eigenvalue_range=eigenvalue_range
    )

    def transcription(x_TD):
        def activated(linear, convolution):
            y_TD = x_TD @ weight(linear)
            y_TD = convolved(y_TD, convolution) if conv_width else y_TD
            return silu(y_TD).reshape(len(x_TD), 2, -1)

        q, k = activated(mixer.query, mixer.conv_q), activated(mixer.key, mixer.conv_k)
        v = activated(mixer.value, mixer.conv_v)
        q, k = unit(q), unit(k)
        beta = beta_max * sigmoid(x_TD @ weight(mixer.beta))
        o = np.zeros_like(v)
        for h in range(2):
            S = np.zeros((8, 8))
            for t in range(len(x_TD)):
                S = (np.eye(8) - beta[t, h] * np.outer(k[t, h], k[t, h])) @ S + beta[
                    t, h
                ] * np.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S / math.sqrt(8)
        return merge(rms(o, array(mixer.norm.scale))) @ weight(mixer.output)

    check_layer(mixer, transcription)


@pytest.mark.parametrize("eigenvalue_range", [(0, 1), (-1, 1)])
def test_mamba_computes_its_block(eigenvalue_range):
    mixer = build_mixer(mamba, state_size=3, dt_rank=2, eigenvalue_range=eigenvalue_range)

    def transcription(u_TD):
        z = u_TD @ weight(mixer.gate)
        x = convolved(u_TD @ weight(mixer.input), mixer.conv)
        x = silu(x + array(mixer.conv.bias_D))
        dt = softplus(x @ weight(mixer.dt_in) @ weight(mixer.dt_out) + array(mixer.dt_bias_E))
        B, C = x @ weight(mixer.write), x @ weight(mixer.read)
        A = -np.exp(array(mixer.a_log_EN))
        h, y = np.zeros_like(A), np.zeros_like(x)
        for t in range(len(x)):
            factor = np.exp(dt[t][:, None] * A)
            if eigenvalue_range == (-1, 1):
                factor = 2 * factor - 1
            h = factor * h + dt[t][:, None] * B[t][None, :] * x[t][:, None]
            y[t] = h @ C[t] + array(mixer.skip_E) * x[t]
        return (y * silu(z)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def rotated(x: np.ndarray, position: int, base: float = 10000.0) -> np.ndarray:
    half = len(x) // 2
    y = np.zeros_like(x)
    for i in range(half):
        angle = position * base ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return y


@pytest.mark.parametrize(
    ("module", "options", "window"),
    [
        (window_attention, {"window": 3, "key_value_heads": 2}, 3),
        (window_attention, {"window": 4, "rope": False, "qk_norm": True}, 4),
        (transformer, {"context_length": LENGTH, "qk_norm": True}, LENGTH),
    ],
)
def test_attention_is_softmax_over_the_window(module, options, window):
    mixer = build_mixer(module, heads=4, **options)
    groups = options.get("key_value_heads", 4)

    def transcription(x_TD):
        q = project(x_TD, mixer.query, 4)
        k, v = (project(x_TD, m, groups) for m in (mixer.key, mixer.value))
        if options.get("qk_norm"):
            q, k = (rms(q, array(mixer.query_norm.scale)), rms(k, array(mixer.key_norm.scale)))
        o = np.zeros((len(x_TD), 4, 4))
        for h in range(4):
            g = h // (4 // groups)
            for t in range(len(x_TD)):
                seen = range(max(0, t - window + 1), t + 1)
                pairs = [(q[t, h], k[s, g]) for s in seen]
                if options.get("rope", True):
                    pairs = [(rotated(q[t, h], t), rotated(k[s, g], s)) for s in seen]
                scores = np.array([a @ b for a, b in pairs]) / math.sqrt(4)
                p = np.exp(scores - scores.max())
                o[t, h] = sum(p_s * v[s, g] for p_s, s in zip(p / p.sum(), seen, strict=True))
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


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


def test_negative_eigenvalues_reach_below_zero_and_default_ones_do_not():
    key = jnp.zeros(WIDTH).at[0].set(1.0)
    step = jax.jit(lambda mixer, x, state: mixer(x, state))

    def eigenvalue(mixer):
        # With v = 0 a unit key direction of the state is multiplied by the moving eigenvalue 1 -
        # beta.
        mixer.value.kernel[...] = jnp.zeros_like(mixer.value.kernel[...])
        # Sigmoid saturates.
        mixer.beta.kernel[...] = jnp.full_like(mixer.beta.kernel[...], 10.0)
        mixer.key.kernel[...] = jnp.eye(WIDTH)
        start = mixer.init_state(1)
        start["memory"] = start["memory"].at[0, 0, 0, 0].set(1.0)
        _, state = step(mixer, key[None, None, :], start)
        return float(state["memory"][0, 0, 0, 0])

    options = {"heads": 1, "conv_width": 0}
    assert eigenvalue(build_mixer(delta_net, **options)) == pytest.approx(0.0, abs=1e-3)
    assert eigenvalue(build_mixer(delta_net, eigenvalue_range=(-1, 1), **options)) == pytest.approx(
        -1.0, abs=1e-3
    )

    def smallest_factor(mixer):
        # Nothing is written, the state only decays.
        mixer.write.kernel[...] = jnp.zeros_like(mixer.write.kernel[...])
        # Delta large: exp(Delta A) -> 0.
        mixer.dt_bias_E[...] = jnp.full_like(mixer.dt_bias_E[...], 20.0)
        start = mixer.init_state(1)
        start["memory"] = jnp.ones_like(start["memory"])
        return float(step(mixer, inputs()[:1, :1], start)[1]["memory"].min())

    assert smallest_factor(build_mixer(mamba)) == pytest.approx(0.0, abs=1e-3)
    assert smallest_factor(build_mixer(mamba, eigenvalue_range=(-1, 1))) == pytest.approx(
        -1.0, abs=1e-3
    )


def test_mamba_starts_as_published():
    mixer: Any = mamba.Mixer(64, depth=8, rngs=nnx.Rngs(0), **FLOAT32)
    dt = softplus(array(mixer.dt_bias_E))
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert dt.min() < 2e-3 and dt.max() > 5e-2, "log-uniform over the whole range"
    np.testing.assert_allclose(
        -np.exp(array(mixer.a_log_EN)), np.tile(-np.arange(1.0, 17.0), (128, 1)), rtol=1e-6
    )
    np.testing.assert_array_equal(array(mixer.skip_E), 1)
    assert mixer.dt_out.kernel.shape == (4, 128)  # R = ceil(64 / 16)
    for parameter, bound in (
        (mixer.input.kernel, 64**-0.5),
        (mixer.dt_out.kernel, 4**-0.5),
        (mixer.conv.weight_WD, 4**-0.5),
        (mixer.output.kernel, (128 * 8) ** -0.5),
    ):
        assert 0.95 * bound < np.abs(array(parameter)).max() <= bound * (1 + 1e-6)
    groups = {
        path[-1]: p.get_metadata().get("group")
        for path, p in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    }
    assert groups["a_log_EN"] == groups["dt_bias_E"] == "ssm" and groups["skip_E"] == "no_decay"
    assert groups["kernel"] is None
