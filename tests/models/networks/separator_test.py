"""The separator: frames, masks, padding, and the published size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks import separator
from tests.support.layers import randomised

SMALL = {
    "group": 4,
    "qk_size": 4,
    "rotary_size": 4,
    "conv_width": 3,
    "recurrent_width": 4,
    "order": 2,
    "dropout": 0.0,
}


def build(sources: int = 2, width: int = 8, depth: int = 1, **mixer: Any) -> Any:
    config = {"width": width, "depth": depth, "norm": "none", "mlp": "none"}
    config |= {"pattern": ("mossformer2",), "mixers": {"mossformer2": mixer}}
    given: dict[str, Any] = {"param_dtype": "float32", "compute_dtype": "float32"}
    return separator.build(config, sources=sources, rngs=nnx.Rngs(0, dropout=1), **given)


@functools.cache
def small() -> Any:
    return randomised(lambda: build(**SMALL))


@jax.jit
def separate(model, mixture, lengths):
    return model(mixture, lengths)


def test_the_published_model_has_as_many_parameters_as_published():
    """55.7 million (Zhao et al., ICASSP 2024, table of WSJ0-2mix); nothing is computed."""
    model = nnx.eval_shape(lambda: build(width=512, depth=24))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 1) == 55.7


def test_frames_are_cut_and_added_as_by_strided_convolutions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 23)).astype(np.float32)
    weight = rng.standard_normal((6, 3)).astype(np.float32)
    frames = separator.cut(x, 6, 2)
    want = jax.lax.conv_general_dilated(
        x[..., None], weight[:, None], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(frames @ weight, want, rtol=1e-5, atol=1e-5)

    y = rng.standard_normal((2, 1, *frames.shape[1:])).astype(np.float32)
    _, transposed = jax.vjp(lambda x: separator.cut(x, 6, 2), jnp.zeros((2, 22)))
    (want,) = transposed(y[:, 0])  # cutting and adding are each other's transpose
    np.testing.assert_allclose(separator.overlap_add(y, 2)[:, 0], want, rtol=1e-5, atol=1e-5)


def test_padding_and_other_mixtures_change_nothing():
    """Also where padding is not finite, and a group of tokens is cut by it."""
    rng = np.random.default_rng(0)
    lengths = np.array([77, 16, 83])
    padded = np.full((3, 83), np.nan, np.float32)
    for row, length in enumerate(lengths):
        padded[row, :length] = rng.standard_normal(length)
    got = np.asarray(separate(small(), padded, lengths))
    alone = np.asarray(separate(small(), padded[:1, :77], None))[0]
    assert np.abs(alone).max() > 1e-2
    np.testing.assert_allclose(got[0, :, :77], alone, atol=2e-5 * np.abs(alone).max())
    for row, length in enumerate(lengths):
        assert np.all(got[row, :, length:] == 0)
    assert np.all(np.isfinite(got))


def test_a_louder_mixture_has_louder_sources_and_silence_has_none():
    rng = np.random.default_rng(0)
    mixture = rng.standard_normal((3, 83)).astype(np.float32)
    mixture[1], mixture[2] = 4 * mixture[0], 0
    got = np.asarray(separate(small(), mixture, np.full(3, 83)))
    np.testing.assert_allclose(got[1], 4 * got[0], atol=1e-4 * np.abs(got[1]).max())
    assert np.all(got[2] == 0)


@pytest.mark.slow
def test_silence_has_finite_derivatives():
    def loss(model: Any) -> jax.Array:
        return jnp.sum(jnp.square(model(jnp.zeros((1, 40))) - 1))

    slopes = jax.jit(nnx.grad(loss))(small())
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 15), r"with the 16 samples of a frame or more; got \(1, 15\)"), ((16,), "must be")],
    ids=str,
)
def test_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"lengths must be \[1\] for mixtures \(1, 20\)"):
        small()(jnp.zeros((1, 20)), jnp.zeros(2, int))
