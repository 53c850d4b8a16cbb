"""LinFusion's attention against its equations."""

from typing import Any

import jax
import numpy as np
import pytest

from models import linfusion
from tests.support.layers import array, build_mixer, check_layer, inputs, merge, weight

HEADS = 2


def dense(linear, x):
    return x @ weight(linear) + array(linear.bias)


def mapped(feature_map, x):
    h = dense(feature_map.first, x)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * array(feature_map.norm.scale) + array(feature_map.norm.bias)
    return x + dense(feature_map.second, np.where(h > 0, h, 0.01 * h))


def transcription(mixer, x_TD):
    q, k = (
        dense(linear, mapped(feature_map, x_TD)).reshape(len(x_TD), HEADS, -1)
        for linear, feature_map in ((mixer.query, mixer.query_map), (mixer.key, mixer.key_map))
    )
    q, k = (np.where(a > 0, a + 1, np.exp(a)) for a in (q, k))
    scores = np.einsum("thk,shk->hts", q, k) / len(x_TD)
    scores /= scores.sum(axis=-1, keepdims=True) + 1e-4
    v = dense(mixer.value, x_TD).reshape(len(x_TD), HEADS, -1)
    return dense(mixer.output, merge(np.einsum("hts,shk->thk", scores, v)))


def test_the_layer_computes_its_equations():
    mixer: Any = build_mixer(linfusion, heads=HEADS)
    check_layer(mixer, lambda x: transcription(mixer, x))


def test_more_tokens_of_the_same_kind_change_nothing_and_no_order_is_seen():
    mixer: Any = build_mixer(linfusion, heads=HEADS)
    call = jax.jit(lambda x: mixer(x)[0])
    x, order = inputs(), np.random.default_rng(0).permutation(14)
    want = np.tile(np.asarray(call(x)), (1, 2, 1))
    got = call(np.tile(x, (1, 2, 1))[:, order])
    np.testing.assert_allclose(got, want[:, order], atol=2e-5 * np.abs(want).max())


def test_heads_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="heads must divide the 16 channels"):
        build_mixer(linfusion, heads=3)
