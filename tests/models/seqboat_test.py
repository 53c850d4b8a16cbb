"""SeqBoat against a slow transcription of its paper: its average, its router, and attention to
activated tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import seqboat
from models.parts.variables import Report
from tests.support.layers import (
    LENGTH,
    WIDTH,
    array,
    build_mixer,
    call,
    check_layer,
    count_parameters,
    inputs,
    rotated,
    sigmoid,
    silu,
    weight,
)

KEY, WINDOW = 6, 2


def build(**options):
    """A mixer whose router activates half of the tokens of `inputs()`."""
    sizes = {"window": WINDOW, "key_size": KEY, "state_size": 3}
    mixer = build_mixer(seqboat, **(sizes | options))
    m = np.concatenate([features(mixer, x) for x in inputs()])
    r = m @ weight(mixer.router)
    mixer.router.bias[...] = jnp.array([np.median(r[:, 1] - r[:, 0]), 0.0])
    return mixer


def affine(x, linear):
    return x @ weight(linear) + array(linear.bias)


def average(ema, x_TD):
    p = sigmoid(array(ema.damping_DN))
    a = 1 - p * sigmoid(array(ema.decay_DN))
    h, y_TD = np.zeros_like(a), np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        h = a * h + p * array(ema.write_DN) * x[:, None]
        y_TD[t] = (array(ema.read_DN) * h).sum(-1) / np.sqrt(h.shape[1])
    return y_TD


def features(mixer, x_TD):
    y_TD = average(mixer.ema, x_TD) + array(mixer.ema.skip_D) * x_TD
    if mixer.backward_ema is not None:
        y_TD = y_TD + average(mixer.backward_ema, x_TD[::-1])[::-1]
    return silu(y_TD)


def gates(mixer, m_TD):
    r = affine(m_TD, mixer.router) / np.exp(array(mixer.temperature_log))
    p = np.exp(r) / np.exp(r).sum(-1, keepdims=True)
    return np.where(p[:, 1] > p[:, 0], p[:, 1], 0.0)


def transcription(mixer, x_TD):
    m_TD = features(mixer, x_TD)
    g_T = gates(mixer, m_TD)
    frequency = 10000.0 ** (-np.arange(KEY // 2) / (KEY // 2))
    h_TD = affine(m_TD, mixer.linear) + x_TD
    active = []
    for t in np.flatnonzero(g_T):
        z, rho, v = (
            silu(affine(m_TD[t], linear)) for linear in (mixer.shared, mixer.gate, mixer.value)
        )
        q, k = (
            rotated(z * scale + shift, t * frequency)
            for scale, shift in zip(array(mixer.scale_2Z), array(mixer.shift_2Z), strict=True)
        )
        active.append((t, q, k, v, rho))
    for i, (t, q, _, _, rho) in enumerate(active):
        seen = active[max(0, i - WINDOW) : i + 1 + (0 if mixer.causal else WINDOW)]
        products = np.array([q @ k for _, _, k, _, _ in seen])
        if mixer.attention == "squared_relu":
            attention = np.maximum(products / (WINDOW if mixer.causal else 2 * WINDOW), 0) ** 2
        else:
            logits = products / np.sqrt(KEY)
            attention = np.exp(logits) / np.exp(logits).sum()
        o = sum(w * v for w, (_, _, _, v, _) in zip(attention, seen, strict=True))
        h_TD[t] += g_T[t] * ((o * rho) @ weight(mixer.output))
    return silu(h_TD)


def density(mixer):
    return np.mean([(gates(mixer, features(mixer, x)) > 0).mean() for x in inputs()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["softmax", "squared_relu"])
def test_seqboat_computes_its_average_router_and_attention(attention, causal):
    mixer = build(attention=attention, causal=causal)
    assert density(mixer) == 0.5
    check_layer(mixer, functools.partial(transcription, mixer))


@pytest.mark.parametrize(("bias", "active"), [(-50.0, 0), (50.0, LENGTH)])
def test_a_router_that_never_or_always_activates(bias, active):
    mixer = build()
    mixer.router.bias[...] = jnp.array([0.0, bias])
    assert density(mixer) == active / LENGTH
    check_layer(mixer, functools.partial(transcription, mixer))
    if not active:  # the linear path alone
        x = inputs()[0].astype(np.float64)
        want = silu(affine(features(mixer, x), mixer.linear) + x)
        np.testing.assert_allclose(call(mixer, inputs())[0], want, atol=2e-5)


def test_a_window_of_the_whole_sequence_is_full_attention_to_activated_tokens():
    whole, longer = build(window=LENGTH - 1), build(window=3 * LENGTH)
    np.testing.assert_allclose(call(whole, inputs()), call(longer, inputs()), rtol=0, atol=1e-5)
    assert np.abs(call(whole, inputs()) - call(build(window=1), inputs())).max() > 1e-3


def test_compressing_and_extracting_returns_activated_rows_in_order():
    active = jnp.array([[False, True, True, False, True], [False] * 5, [True] * 5])
    plan = seqboat.compress(active, None)
    x = jnp.arange(15).reshape(3, 5)
    packed = jnp.take_along_axis(x, plan.token, axis=1)
    np.testing.assert_array_equal(packed[0, :3], [1, 2, 4])
    np.testing.assert_array_equal(plan.activated, [3, 0, 5])
    back = jnp.where(active, jnp.take_along_axis(packed, plan.row, axis=1), 0)
    np.testing.assert_array_equal(back, np.where(active, x, 0))


def test_the_router_learns_from_activated_tokens_alone_and_reports_their_share():
    mixer, x = build(), jnp.asarray(inputs())
    m = jnp.asarray(np.stack([features(mixer, row) for row in inputs()]), jnp.float32)
    g = mixer.route(m)
    cotangent = jax.random.normal(jax.random.key(0), g.shape)
    gradient = jax.grad(lambda m: jnp.sum(mixer.route(m) * cotangent))(m)
    assert np.abs(gradient[g == 0]).max() == 0
    assert np.abs(gradient[g > 0]).max(axis=-1).min() > 0
    reports = jax.jit(lambda mixer, x: nnx.capture(mixer, Report)(x)[1])(mixer, x)
    np.testing.assert_allclose(reports["activation_density"][...], density(mixer), rtol=1e-6)


def test_the_average_is_stable_for_every_parameter():
    mixer = build()
    mixer.ema.damping_DN[...] = jnp.full((WIDTH, 3), 9.0)
    mixer.ema.decay_DN[...] = jnp.full((WIDTH, 3), -9.0)
    factor, _ = mixer.ema.factors()
    assert factor.min() > 0.999 and factor.max() < 1
    mixer.ema.decay_DN[...] = jnp.full((WIDTH, 3), 9.0)
    assert 0 < mixer.ema.factors()[0].max() < 1e-3


def test_published_size():
    d, hidden, z, n = 128, 256, 64, 16  # Long Range Arena, text
    ema = 4 * d * n + d
    maps = d * 2 + 2 + d * d + d + d * z + z + 2 * (d * hidden + hidden) + hidden * d
    want = ema + maps + 1 + 4 * z
    assert count_parameters(seqboat, d, depth=4) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": "laplace"},
            "attention must be one of 'softmax', 'squared_relu'; got 'laplace'",
        ),
        ({"window": 0}, "window must be at least 1 .* got 0 and 0.3"),
        ({"init_temperature": 0.0}, "init_temperature greater than 0; got 2 and 0.0"),
        ({"key_size": 5}, "need an even head size; got 5"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
