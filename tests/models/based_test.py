"""Based's feature map, and its layer against a slow transcription of its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import based
from models.blocks.stack import state_bytes
from tests.support.layers import (
    FLOAT32,
    build_mixer,
    check_layer,
    merge,
    normalised,
    project,
    weight,
)


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
