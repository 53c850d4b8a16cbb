"""LightNet against the softmax over the past that it computes, and the running sums that it needs
for that."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lightnet
from models.lightnet import running_normaliser
from tests.support.layers import (
    array,
    build_mixer,
    call,
    check_layer,
    count_parameters,
    inputs,
    merge,
    project,
    rms,
    silu,
    weight,
)


@pytest.mark.parametrize(("empty_sum", "start"), [("zero", 0.0), ("one", 1.0)])
def test_lightnet_weighs_the_past_by_a_softmax_per_channel(empty_sum, start):
    mixer = build_mixer(lightnet, heads=2, gate_rank=3, empty_sum=empty_sum)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        o = np.zeros_like(v)
        for t in range(len(x_TD)):
            # No recurrence at all.
            weights = np.exp(k[: t + 1]) / (start + np.exp(k[: t + 1]).sum(0))
            S = np.einsum("shk,shv->hkv", weights, v[: t + 1])
            o[t] = np.einsum("hk,hkv->hv", silu(q[t]), S) / math.sqrt(8)
        gate = silu(x_TD @ weight(mixer.output_gate_in) @ weight(mixer.output_gate_out))
        return (rms(merge(o), array(mixer.norm.scale)) * gate) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_lightnet_ignores_a_constant_in_its_keys_and_survives_large_ones():
    mixer = build_mixer(lightnet, heads=2, gate_rank=3)
    x = inputs()
    # A constant input channel: its row of W_k adds a constant to the keys.
    x[:, :, 0] = 1.0
    want = call(mixer, x)
    mixer.key.kernel[...] = mixer.key.kernel[...].at[0].add(80.0)
    # Keys near 80 are rounded to 80 * 2^-24.
    np.testing.assert_allclose(call(mixer, x), want, atol=2e-4)
    mixer.key.kernel[...] = mixer.key.kernel[...].at[1].add(1e4)
    gradients = jax.jit(jax.grad(lambda mixer, x: jnp.sum(mixer(x)[0] ** 2)))(mixer, x)
    assert all(
        np.isfinite(np.asarray(leaf)).all()
        for leaf in [call(mixer, x), *jax.tree.leaves(gradients)]
    )


@pytest.mark.parametrize("empty", [-math.inf, 0.0])
def test_the_running_normaliser_starts_anew_in_each_segment(empty):
    k = np.random.default_rng(0).standard_normal((1, 7, 3)).astype(np.float32)
    initial = np.full((1, 3), 0.7, np.float32)
    z, before = jax.jit(running_normaliser, static_argnames=("empty", "reverse"))(
        k,
        empty=empty,
        initial_BD=initial,
        segment_ids=jnp.array([[4, 4, 4, 1, 1, 4, 4]]),
        reverse=False,
    )
    want, want_before = np.zeros((7, 3)), np.zeros((7, 3))
    for t in range(7):
        want_before[t] = initial[0] if t == 0 else empty if t in (3, 5) else want[t - 1]
        want[t] = np.logaddexp(want_before[t], k[0, t])
    np.testing.assert_allclose(z[0], want, atol=1e-6)
    np.testing.assert_allclose(before[0], want_before, atol=1e-6)


def test_lightnet_has_four_squares_of_its_width_and_a_low_rank_gate():
    assert (
        count_parameters(lightnet, 1024, depth=24, heads=8) == 4 * 1024**2 + 2 * 128 * 1024 + 1024
    )


def test_step_by_step_equals_parallel():
    mixer, x = build_mixer(lightnet, heads=2, gate_rank=3), inputs()
    run = jax.jit(lambda mixer, x, state: mixer(x, state))
    whole, final = run(mixer, x, mixer.init_state(len(x)))
    state, pieces = mixer.init_state(len(x)), []
    for t in range(x.shape[1]):
        y, state = run(mixer, x[:, t : t + 1], state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state["normaliser_log"], final["normaliser_log"], atol=1e-6)
    np.testing.assert_allclose(state["memory"], final["memory"], atol=1e-5)
