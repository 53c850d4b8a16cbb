"""Hedgehog, Based and TransNormer: feature maps, and layers against slow transcriptions of their
papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import based, diag_attention, hedgehog, transnormer
from models.networks.stack import state_bytes
from tests.support.layers import (
    FLOAT32,
    array,
    build_mixer,
    call,
    check_layer,
    count_parameters,
    inputs,
    merge,
    project,
    rms,
    rotated,
    weight,
)


def normalised(q_features, k_features, v):
    """sum_{s <= t} score v / sum_{s <= t} score, over explicit scores."""
    scores = np.tril(np.einsum("thf,shf->hts", q_features, k_features))
    return np.einsum("hts,shv->thv", scores / scores.sum(-1, keepdims=True), v)


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


def test_based_computes_its_attention():
    mixer = build_mixer(based, heads=2, feature_size=4)

    def dense(x):  # the paper's layout, each product twice
        x = x / 4**0.25
        products = np.einsum("thi,thj->thij", x, x).reshape(*x.shape[:2], -1) / math.sqrt(2)
        return np.concatenate((np.ones_like(x[..., :1]), x, products), axis=-1)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        return merge(normalised(dense(q), dense(k), v)) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_based_features_give_the_taylor_series_and_a_denominator_of_at_least_half():
    q, k = (
        jnp.asarray(x, jnp.float32)
        for x in 2 * np.random.default_rng(0).standard_normal((2, 1, 50, 1, 16))
    )
    scores = np.einsum("bthf,bshf->ts", based.taylor_features(q), based.taylor_features(k))
    s = np.einsum("bthk,bshk->ts", np.asarray(q, np.float64), np.asarray(k, np.float64)) / 4
    np.testing.assert_allclose(scores, 1 + s + s**2 / 2, rtol=1e-4, atol=1e-4)
    assert scores.min() >= 0.5 - 1e-4
    assert [based.feature_count(size) for size in (8, 16, 24, 32)] == [45, 153, 325, 561]


def test_based_state_has_its_closed_form_at_the_published_size():
    mixer = nnx.eval_shape(lambda: based.Mixer(1024, depth=27, rngs=nnx.Rngs(0), **FLOAT32))
    state = jax.eval_shape(lambda: mixer.init_state(1))
    assert state_bytes(mixer) == 4 * 16 * 153 * (1024 // 16 + 1) == 4 * state["memory"].size


def turned(mixer, x_THK):
    return rotated(x_THK, np.arange(len(x_THK))[:, None, None] * array(mixer.rotation.theta_K))


def test_norm_attention_computes_its_layer_and_ignores_the_size_of_values():
    mixer = build_mixer(transnormer, heads=2)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        q, k = (turned(mixer, np.where(x > 0, x + 1, np.exp(x))) for x in (q, k))
        o = np.einsum("hts,shv->thv", np.tril(np.einsum("thk,shk->hts", q, k)), v)
        return rms(merge(o), eps=1e-6) @ weight(mixer.output)

    check_layer(mixer, transcription)
    want = call(mixer, inputs())
    mixer.value.kernel[...] = 3 * mixer.value.kernel[...]
    np.testing.assert_allclose(call(mixer, inputs()), want, atol=1e-4)


@pytest.mark.parametrize("block", [3, 64])
def test_diag_attention_is_softmax_attention_inside_blocks(block):
    mixer = build_mixer(diag_attention, heads=2, block=block)

    def transcription(x_TD):
        q, k, v = (project(x_TD, m, 2) for m in (mixer.query, mixer.key, mixer.value))
        q, k = turned(mixer, q), turned(mixer, k)
        o = np.zeros_like(v)
        for t in range(len(x_TD)):
            seen = slice(t - t % block, t + 1)
            scores = np.exp(np.einsum("hk,shk->hs", q[t], k[seen]) / math.sqrt(8))
            o[t] = np.einsum("hs,shv->hv", scores / scores.sum(-1, keepdims=True), v[seen])
        return merge(o) @ weight(mixer.output)

    check_layer(mixer, transcription)


def test_a_mixer_of_transnormer_has_four_squares_of_its_width():
    for module in (transnormer, diag_attention):
        assert count_parameters(module, 768, depth=12, heads=12) == 4 * 768**2 + 32
