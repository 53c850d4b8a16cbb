"""LiT's attention against its equations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lit
from tests.models.slab_test import Filters
from tests.models.vig_test import convolved
from tests.support.layers import array, build_mixer, check_layer, inputs, merge, weight

HEADS = 2


def weights(mixer, x_TD, heads=HEADS):
    """[H, T, T]: the share of each token in what another one reads, up to 1e-6."""

    def features(linear):
        mixed = np.maximum(x_TD @ weight(linear) + array(linear.bias), 0) + 1e-6
        return mixed.reshape(len(x_TD), heads, -1)

    scores = np.einsum("thk,shk->hts", features(mixer.query), features(mixer.key)) / len(x_TD)
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-6)


def positive(mixer):
    """With features of which each head of each token has some that are not about 0."""
    for linear in (mixer.query, mixer.key):
        linear.bias[...] += 4.0
    return mixer


def values(mixer, x_TD):
    return x_TD @ weight(mixer.value) + array(mixer.value.bias)


def transcription(mixer, x_TD, grid):
    v = values(mixer, x_TD)
    o = merge(np.einsum("hts,shk->thk", weights(mixer, x_TD), v.reshape(len(x_TD), HEADS, -1)))
    if mixer.weight_YXK is not None:
        o = o + convolved(v, Filters(mixer), grid) + np.tile(array(mixer.bias_K), HEADS)
    return o @ weight(mixer.output) + array(mixer.output.bias)


@pytest.mark.parametrize("kernel_size", [5, 0])
def test_the_layer_computes_its_equations(kernel_size):
    mixer: Any = build_mixer(lit, heads=HEADS, kernel_size=kernel_size)
    check_layer(mixer, lambda x: transcription(mixer, x, (1, 7)))


def test_each_head_is_the_formula_of_one_head_on_its_slice_and_together_they_are_not():
    two, one = (positive(build_mixer(lit, heads=h, kernel_size=0)) for h in (HEADS, 1))
    x = inputs()[0].astype(np.float64)
    rows = weights(two, x)
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-4)
    sliced = [two.query, two.key]
    for head in range(HEADS):
        part = slice(8 * head, 8 * head + 8)
        q, k = (np.maximum(x @ weight(m)[:, part] + array(m.bias)[part], 0) + 1e-6 for m in sliced)
        alone = q @ k.T
        np.testing.assert_allclose(rows[head], alone / alone.sum(-1, keepdims=True), rtol=1e-3)
    # The same parameters with one denominator for both.
    together = np.asarray(jax.jit(lambda m, x: m(x)[0])(one, inputs()))
    apart = np.asarray(jax.jit(lambda m, x: m(x)[0])(two, inputs()))
    assert np.abs(together - apart).max() > 1e-3


def test_one_token_reads_itself_and_the_convolution():
    mixer = positive(build_mixer(lit, heads=HEADS))
    x = inputs()[:, :1]
    v = values(mixer, x[:, 0].astype(np.float64))
    o = v + v * np.tile(array(mixer.weight_YXK)[2, 2], HEADS) + np.tile(array(mixer.bias_K), HEADS)
    want = o @ weight(mixer.output) + array(mixer.output.bias)
    np.testing.assert_allclose(mixer(x)[0][:, 0], want, atol=2e-5 * np.abs(want).max())


def test_no_feature_is_zero_and_what_is_small_stays_finite():
    mixer: Any = build_mixer(lit, heads=HEADS, kernel_size=0)
    for linear in (mixer.query, mixer.key):
        linear.bias[...] = jnp.full(16, -1e3)
    x = jnp.asarray(inputs())
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(mixer(x)[0] ** 2)))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, or 0 for none; got 4"),
        ({"feature_map": "elu"}, "feature_map must be one of 'relu', 'gelu'; got 'elu'"),
        ({"heads": 3}, "heads must divide the 16 channels"),
    ],
)
def test_impossible_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(build_mixer, lit)(**options)
