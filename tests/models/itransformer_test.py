"""iTransformer's attention against a slow transcription of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import itransformer
from tests.support.layers import array, build_mixer, check_layer, merge, weight

HEADS = 4


def attended(mixer, x_TD):
    q, k, v = (
        (x_TD @ weight(linear) + array(linear.bias)).reshape(len(x_TD), HEADS, -1)
        for linear in (mixer.query, mixer.key, mixer.value)
    )
    o = np.zeros_like(v)
    for h in range(HEADS):
        scores = q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        o[:, h] = p / p.sum(axis=1, keepdims=True) @ v[:, h]
    return merge(o) @ weight(mixer.output) + array(mixer.output.bias)


def test_every_token_attends_to_all():
    mixer = build_mixer(itransformer, heads=HEADS, dropout=0.0)
    check_layer(mixer, lambda x_TD: attended(mixer, x_TD))


def test_with_equal_keys_it_is_the_mean():
    mixer = build_mixer(itransformer, heads=HEADS, dropout=0.0)
    mixer.key.kernel[...] = jnp.zeros_like(mixer.key.kernel[...])
    x = np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    mean = x.mean(axis=1) @ weight(mixer.value) + array(mixer.value.bias)
    want = mean @ weight(mixer.output) + array(mixer.output.bias)
    np.testing.assert_allclose(mixer(x)[0], np.repeat(want[:, None], 5, axis=1), atol=2e-5)


def test_weights_and_outputs_are_dropped_in_training_alone():
    mixer, alone = (build_mixer(itransformer, heads=HEADS, dropout=rate) for rate in (0.5, 0.0))
    x = jax.random.normal(jax.random.key(0), (2, 50, 16))
    want = alone(x)[0]
    y = mixer(x)[0]
    kept = y != 0
    assert 0.45 < float(jnp.mean(kept)) < 0.55, "outputs"
    assert float(jnp.abs(jnp.where(kept, y / 2 - want, 0)).max()) > 1e-3, "weights"
    mixer.eval()
    np.testing.assert_array_equal(mixer(x)[0], want)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide the 16 channels"):
        build_mixer(itransformer, heads=3)
