"""Monarch Mixer: Monarch matrices, the transform that is one, and the layer against a slow
transcription."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from models import monarch_mixer
from models.monarch_mixer.monarch import fourier_factors, monarch_convolution, monarch_multiply
from ops import long_convolution
from tests.support.layers import (
    FLOAT32,
    LENGTH,
    array,
    build_mixer,
    call,
    check_layer,
    convolved,
    count_parameters,
    inputs,
    weight,
)

CONTEXT = 5  # shorter than the sequences
build = functools.partial(
    build_mixer, monarch_mixer, context_length=CONTEXT, filter_hidden=6, blocks=2
)


def permutation(b):
    P = np.zeros((b * b, b * b))
    for i in range(b):
        for j in range(b):
            P[j * b + i, i * b + j] = 1
    return P


def test_a_monarch_product_is_p_l_p_r_p():
    b, rng = 3, np.random.default_rng(0)
    left, right = rng.standard_normal((2, b, b, b))
    P = permutation(b)
    L, R = (np.asarray(scipy.linalg.block_diag(*x)) for x in (left, right))
    M = P @ L @ P @ R @ P
    x = rng.standard_normal((2, b * b))
    got = monarch_multiply(*(jnp.asarray(a, jnp.float32) for a in (x, left, right)))
    np.testing.assert_allclose(got, x @ M.T, atol=1e-5)
    # Up to outer permutations every b x b block has rank one.
    blocks = M.reshape(b, b, b, b).transpose(1, 3, 0, 2)
    assert np.linalg.svd(blocks, compute_uv=False)[..., 1:].max() < 1e-12


@pytest.mark.parametrize("b", [1, 4, 23])
def test_the_fourier_transform_is_a_monarch_matrix(b):
    n = b * b
    left, right = fourier_factors(b)
    assert left.size + right.size == 2 * round(n**1.5)
    x = np.random.default_rng(0).standard_normal((2, n))
    got = monarch_multiply(jnp.asarray(x, jnp.complex64), left, right)
    want = np.fft.fft(x)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())
    back = monarch_multiply(got, jnp.conj(left), jnp.conj(right)) / n
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_the_hadamard_matrix_is_a_monarch_matrix_up_to_a_permutation():
    hadamard = scipy.linalg.hadamard(4)
    blocks = jnp.asarray(np.stack([hadamard] * 4), jnp.float32)
    got = monarch_multiply(jnp.asarray(permutation(4), jnp.float32), blocks, blocks)
    np.testing.assert_array_equal(got.T, scipy.linalg.hadamard(16))


def convolution_case(length):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, length, 3))
    return x, jax.random.normal(keys[1], (3, length))


@pytest.mark.parametrize("length", [1, 18, 37])
def test_a_convolution_by_monarch_products_is_the_direct_one(length):
    x, kernel = convolution_case(length)
    want = long_convolution(x, kernel, implementation="reference")
    got = jax.jit(monarch_convolution)(x, kernel)
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.full
def test_a_convolution_of_packed_documents_by_monarch_products_is_the_direct_one():
    x, kernel = convolution_case(83)
    ids = jnp.asarray([np.searchsorted(cuts, np.arange(83)) for cuts in ([29, 30], [63, 69])])
    want = long_convolution(x, kernel, segment_ids=ids, implementation="reference")
    got = jax.jit(monarch_convolution)(x, kernel, segment_ids=ids)
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def affine(x, linear):
    return x @ weight(linear) + array(linear.bias)


def filter_values(of_lags):
    lag = np.arange(CONTEXT)
    t, w = lag / (CONTEXT - 1), 2 * np.pi * lag / CONTEXT
    waves = [np.cos(1e-4 * w), np.cos(w), -np.sin(1e-4 * w), -np.sin(w)]
    x = np.stack([t, *waves], axis=1)
    for layer in of_lags.layers:
        x = np.sin(array(of_lags.omega_F) * affine(x, layer))
    rate = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, of_lags.channels)
    return x @ weight(of_lags.output) * np.exp(-np.outer(t, rate))


def block_diagonal(x, module):
    return x @ scipy.linalg.block_diag(*array(module.kernel_GIO))


def transcription(mixer, x_TD):
    parts = convolved(affine(x_TD, mixer.input), mixer.conv)
    x1, x2, v = np.split(parts, 3, axis=-1)
    beta, residual_beta = array(mixer.beta_2D)

    def convolution(k, u, beta):
        y = beta * u
        for t in range(len(u)):
            for lag in range(min(t + 1, CONTEXT)):
                y[t] += k[lag] * u[t - lag]
        return y

    s = convolution(filter_values(mixer.filter), v * x1, beta) * x2
    s += convolution(filter_values(mixer.residual_filter), x_TD, residual_beta)
    h = affine(s, mixer.output)
    g, a = np.split(block_diagonal(h, mixer.channels_in), 2, axis=-1)
    return h + block_diagonal(gelu(g) * a, mixer.channels_out)


@pytest.mark.parametrize(
    "options", [{"transform": "fft"}, {"transform": "monarch"}, {"conv_width": 0}]
)
def test_monarch_mixer_computes_its_gates_filters_and_channel_mixer(options):
    mixer = build(**options)
    assert LENGTH > CONTEXT
    check_layer(mixer, functools.partial(transcription, mixer))


def test_one_block_is_a_dense_matrix():
    block = monarch_mixer.BlockDiagonal(1, 6, 10, ("embed", "mlp"), rngs=nnx.Rngs(0), **FLOAT32)
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    want = jnp.einsum("btd,df->btf", x, block.kernel_GIO[...][0])
    np.testing.assert_allclose(block(x), want, atol=1e-6)


def test_a_token_reaches_exactly_the_context_after_it():
    # The convolution before reaches two tokens further; it is switched off to its last tap.
    mixer, x = build(conv_width=1), jnp.asarray(inputs())
    changed = call(mixer, x.at[:, 1].add(1.0))
    difference = np.abs(changed - call(mixer, x)).max(axis=(0, 2))
    reached = np.flatnonzero(difference > 1e-4)
    np.testing.assert_array_equal(reached, np.arange(1, 1 + CONTEXT))
    assert difference[0] < 1e-5  # the transform rounds relative to the largest number


def test_filters_start_with_the_published_windows():
    of_lags = monarch_mixer.Filter(8, 64, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    k = np.abs(np.asarray(of_lags(100, of_lags.rates())))
    assert k.shape == (8, 100) and not k[:, 64:].any()
    # At the last lag the slowest channel is down to 100^(-1/1.5), the fastest to 100^(-1/0.3).
    assert k[-1, -37] < 1e-6 < k[0, -37]


def test_published_size():
    d, hidden, L = (
        768,
        128,
        128,
    )  # M2-BERT 80M's width; a causal layer has two filters where that has four
    filters = 2 * (5 * hidden + 2 * hidden**2 + 3 * hidden + hidden + hidden * d)
    maps = d * 3 * d + 3 * d + 4 * 3 * d + 2 * d + d * d + d
    want = maps + filters + (d * 8 * d + 4 * d * d) // 4
    assert count_parameters(monarch_mixer, d, depth=12, context_length=L) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "context_length must be at least 1 .*got 0"),
        ({"transform": "dct"}, "transform must be one of 'fft', 'monarch'; got 'dct'"),
        ({"blocks": 3}, "blocks must divide 16 and 128 channels; got 3"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"must be \[b, b, b\] and x .*\(2, 9\)"):
        monarch_multiply(jnp.zeros((2, 9)), jnp.zeros((2, 2, 2)), jnp.zeros((2, 2, 2)))
