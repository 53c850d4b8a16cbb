"""SOFT against its equations with an exact inverse, and its landmarks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import soft
from models.parts.variables import Report, mean_over_layers
from tests.models.vig_test import convolved
from tests.support.layers import array, build_mixer, inputs, merge, weight

HEADS, GRID = 2, (4, 6)
X = np.random.default_rng(3).standard_normal((2, 24, 16)).astype(np.float32)


def kernel(x, y):
    """exp(-|x_i - y_j|^2 / (2 sqrt(K)))"""
    squares = ((x[:, None] - y[None]) ** 2).sum(-1)
    return np.exp(-squares / (2 * math.sqrt(x.shape[-1])))


def transcription(mixer, x_TD, landmarks_of, normalise=False, grid=GRID):
    def dense(linear):
        return (x_TD @ weight(linear) + array(linear.bias)).reshape(len(x_TD), HEADS, -1)

    q, v = dense(mixer.query), dense(mixer.value)
    o = np.zeros_like(v)
    for h in range(HEADS):
        landmarks = landmarks_of(q[:, h])
        A, P = kernel(landmarks, landmarks), kernel(landmarks, q[:, h])
        D = np.diag(A.sum(1) ** -0.5) if normalise else np.eye(len(A))
        o[:, h] = P.T @ D @ np.linalg.inv(A) @ D @ P @ v[:, h]
    o = merge(o)
    if mixer.weight_YXH is not None:

        class Filters:
            weight_YXD = np.repeat(array(mixer.weight_YXH), 8, axis=-1)

        o = o + convolved(merge(v), Filters, grid)
    return o @ weight(mixer.output) + array(mixer.output.bias)


def means(q_TK):
    return q_TK.reshape(2, 2, 3, 2, -1).mean(axis=(1, 3)).reshape(6, -1)


def make(**options):
    exact = {"size_per_head": 8, "window": 2, "jitter": 0.0, "iterations": 60}
    return build_mixer(soft, **{**exact, **options})


def check(mixer, landmarks_of, **options):
    got = np.asarray(mixer(X, grid=GRID)[0])
    want = np.stack(
        [transcription(mixer, x.astype(np.float64), landmarks_of, **options) for x in X]
    )
    # The condition of A is in the hundreds: so many roundings of float32.
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("normalise", [False, True])
def test_soft_computes_its_equations(normalise):
    check(make(normalise=normalise, kernel_size=3), means, normalise=normalise)


def test_learned_landmarks_are_a_convolution_with_its_own_norm():
    mixer: Any = make(sampling="convolution")
    mixer.sampler_norm.scale[...] *= 5  # landmarks far from each other have an inverse in float32
    w, scale = array(mixer.sampler_YXKL), array(mixer.sampler_norm.scale)

    def landmarks_of(q_TK):
        q = q_TK.reshape(2, 2, 3, 2, -1)
        y = np.einsum("rycxk,yxkl->rcl", q, w).reshape(6, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        y = y * scale + array(mixer.sampler_norm.bias)
        return y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2

    check(mixer, landmarks_of)


def test_with_a_landmark_for_each_token_the_kernel_is_whole():
    mixer: Any = make(window=1)
    x = X[:, :4]  # few, for an inverse without loss
    q, v = (
        (x @ weight(m) + array(m.bias)).reshape(2, 4, HEADS, -1) for m in (mixer.query, mixer.value)
    )
    o = np.stack(
        [
            np.stack([kernel(q[b, :, h], q[b, :, h]) @ v[b, :, h] for h in range(HEADS)], axis=1)
            for b in range(2)
        ]
    )
    want = o.reshape(2, 4, 16) @ weight(mixer.output) + array(mixer.output.bias)
    got = np.asarray(mixer(x, grid=(2, 2))[0])
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_on_a_line_a_window_is_as_many_tokens_and_the_last_has_fewer():
    mixer: Any = make()
    got = np.asarray(mixer(inputs())[0])

    def landmarks_of(q_TK):
        return np.stack([q_TK[:4].mean(0), q_TK[4:].mean(0)])

    want = np.stack(
        [transcription(mixer, x.astype(np.float64), landmarks_of, grid=(1, 7)) for x in inputs()]
    )
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_what_the_iteration_leaves_is_reported():
    for iterations, (low, high) in ((1, (0.1, 1.0)), (60, (0.0, 1e-4))):
        mixer = make(iterations=iterations)
        _, reports = nnx.capture(lambda m: m(X, grid=GRID)[0], Report)(mixer)
        assert low < float(mean_over_layers(reports)["newton_residual"]) < high


def test_equal_tokens_give_numbers_and_gradients():
    mixer: Any = make()
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(mixer(x, grid=GRID)[0]))(
        jnp.ones((1, 24, 16))
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: make(window=3)(X, grid=GRID),
            r"window must divide the grid .*; got 3 for \(4, 6\)",
        ),
        (lambda: make(size_per_head=5), "size_per_head must divide the width 16; got 5"),
        (lambda: make(sampling="random"), "sampling must be one of 'average', 'convolution'"),
        (lambda: make(sampling="convolution")(X), "sampling='convolution' needs a grid of tokens"),
    ],
)
def test_what_cannot_be_is_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
