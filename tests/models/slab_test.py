"""Simplified linear attention against its equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import slab
from tests.models.vig_test import convolved
from tests.support.layers import array, build_mixer, check_layer, inputs, merge, weight

HEADS, GRID = 2, (3, 4)


class Filters:
    """The filters of a mixer as those of every channel."""

    def __init__(self, mixer):
        self.weight_YXD = np.tile(array(mixer.weight_YXK), (1, 1, HEADS))


def transcription(mixer, x_TD, grid, position=0.0):
    def dense(linear):
        return x_TD @ weight(linear) + array(linear.bias)

    def split(a):
        return a.reshape(len(x_TD), HEADS, -1)

    q, k = (
        split(np.maximum(dense(mixer.query), 0)),
        split(np.maximum(dense(mixer.key) + position, 0)),
    )
    v = dense(mixer.value)
    scores = np.einsum("thk,shk->hts", q, k)
    scores /= scores.sum(axis=-1, keepdims=True) + 1e-6
    o = merge(np.einsum("hts,shk->thk", scores, split(v)))
    if mixer.weight_YXK is not None:
        o = o + convolved(v, Filters(mixer), grid) + np.tile(array(mixer.bias_K), HEADS)
    return o @ weight(mixer.output) + array(mixer.output.bias)


@pytest.mark.parametrize("kernel_size", [5, 0])
def test_simplified_linear_attention_computes_its_equations(kernel_size):
    mixer = build_mixer(slab, heads=HEADS, kernel_size=kernel_size)
    check_layer(mixer, lambda x: transcription(mixer, x, (1, 7)))


def test_positions_join_the_keys_of_their_grid_and_are_resized_for_another():
    mixer: Any = build_mixer(slab, heads=HEADS, position_grid=GRID)
    x = np.random.default_rng(3).standard_normal((1, 12, 16)).astype(np.float32)
    want = transcription(mixer, x[0].astype(np.float64), GRID, array(mixer.position_PD))
    got = np.asarray(mixer(x, grid=GRID)[0][0])
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert np.isfinite(mixer(np.tile(x, (1, 2, 1)), grid=(6, 4))[0]).all()
    with pytest.raises(ValueError, match="slab with position_grid needs a grid of tokens"):
        mixer(x)


def test_without_positions_and_convolution_no_order_is_seen():
    mixer: Any = build_mixer(slab, heads=HEADS, kernel_size=0)
    x, order = inputs(), np.random.default_rng(0).permutation(7)
    want = np.asarray(mixer(x)[0])[:, order]
    np.testing.assert_allclose(mixer(x[:, order])[0], want, atol=1e-5 * np.abs(want).max())


def test_the_convolution_alone_reaches_five_by_five_tokens():
    mixer: Any = build_mixer(slab, heads=HEADS)
    for linear in (mixer.query, mixer.key):  # no query is positive: o is 0
        linear.kernel[...] *= 0
        linear.bias[...] = jnp.full(16, -1.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 63, 16)), jnp.float32)

    def middle(x):
        return jnp.sum(mixer(x, grid=(7, 9))[0][0, 31])

    gradient = np.abs(np.asarray(jax.grad(middle)(x))[0]).max(axis=-1)
    assert (gradient > 0).sum() == 25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, or 0 for none; got 4"),
        ({"position_grid": (4,)}, r"position_grid must be \(\) or \(rows, columns\); got \(4,\)"),
        ({"heads": 3}, "heads must divide the 16 channels"),
    ],
)
def test_impossible_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(slab, **{"heads": HEADS, **options})
