"""The diffusion Transformer: published sizes, identity at first, against its equations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.configs.dit import SIZES
from models.blocks.patches import from_patches, to_patches
from models.networks.diffusion_transformer import build
from tests.support.layers import FLOAT32, array, randomised, silu
from tests.support.mixers import SegmentMean, add_mixers

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
TIMES, CLASSES = np.array([3.0, 700.5], np.float32), np.array([1, 5])
PLAIN = {"mlp": "gelu_tanh", "norm": "layer_plain", "norm_eps": 1e-6}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_mixers(monkeypatch, segment_mean=SegmentMean)


def denoiser(
    rows: int = 4,
    columns: int = 6,
    channels: int = 3,
    classes: int = 5,
    frames: int = 0,
    **model: Any,
):
    config = {"width": 8, "depth": 2, "pattern": ("segment_mean",), **PLAIN, "patch": 2}
    sizes = {"classes": classes, "channels": channels, "height": rows, "width": columns}
    sizes["frames"] = frames
    return build(config | model, output_channels=2 * channels, rngs=nnx.Rngs(0), **sizes, **FLOAT32)


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def waves(place, size):
    angle = np.asarray(place, np.float64)[:, None] * 10_000.0 ** (-np.arange(size // 2) * 2 / size)
    return np.concatenate((np.cos(angle), np.sin(angle)), axis=-1)


def test_the_network_computes_its_equations():
    model = randomised(denoiser)
    condition = model.condition

    def dense(linear, x):
        return x @ array(linear.kernel) + array(linear.bias)

    c = dense(condition.second, silu(dense(condition.first, waves(TIMES, 256))))
    c = c + array(condition.table_CD)[CLASSES]
    patches = IMAGES.reshape(2, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 12)
    conv = model.embedding.layers[0]
    x = patches @ array(conv.kernel).reshape(12, 8) + array(conv.bias)
    places = np.concatenate((waves([0, 1, 2, 0, 1, 2], 4), waves([0, 0, 0, 1, 1, 1], 4)), axis=-1)
    x = jnp.asarray(x + places, jnp.float32)
    x = np.asarray(model.stack(x, None, condition=jnp.asarray(c, jnp.float32))[0], np.float64)
    shift, scale = np.split(dense(model.modulation, silu(c))[:, None], 2, axis=-1)
    y = dense(model.head, normalised(x) * (1 + scale) + shift)
    want = y.reshape(2, 2, 3, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 6, 6)
    got = jax.jit(lambda m, *a: m(*a))(model, IMAGES, TIMES, CLASSES)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


def test_fresh_blocks_are_the_identity_and_predict_nothing():
    model = denoiser()
    x = jnp.asarray(RNG.standard_normal((2, 6, 8)), jnp.float32)

    @jax.jit
    def seen(model):
        c = model.condition(TIMES, CLASSES)
        return c, model.stack(x, None, condition=c)[0], model(IMAGES, TIMES, CLASSES)

    c, after, said = seen(model)
    assert float(jnp.abs(c[0] - c[1]).max()) > 1e-3
    np.testing.assert_array_equal(after, x)
    np.testing.assert_array_equal(said, np.zeros((2, 4, 6, 6)))


def test_what_mixers_return_is_kept_in_the_order_of_layers():
    model = randomised(lambda: denoiser(depth=3, pattern=("segment_mean", "vit")))
    outputs = jax.jit(lambda m: m.with_outputs(IMAGES, TIMES, CLASSES)[1])(model)
    assert outputs.shape == (3, 2, 6, 8)
    condition = model.condition(jnp.asarray(TIMES), jnp.asarray(CLASSES))
    x, (first, _) = model.embedding(jnp.asarray(IMAGES)), model.stack.period
    block = jax.tree.map(lambda leaf: leaf[0], first)
    (shift, scale, _), _ = block.modulations(condition, 8)
    want, _ = block.mixer(block.mixer_norm(x) * (1 + scale) + shift)
    np.testing.assert_allclose(outputs[0], want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_kept_attention_is_what_the_output_map_reads():
    model = randomised(lambda: denoiser(depth=1, pattern=("vit",), mixers={"vit": {"heads": 2}}))

    @jax.jit
    def kept(model):
        return [model.with_outputs(IMAGES, TIMES, CLASSES, k) for k in ("outputs", "attention")]

    (said, outputs), (same, attention) = kept(model)
    mixer = jax.tree.map(lambda leaf: leaf[0], model.stack.period)[0].mixer
    np.testing.assert_allclose(mixer.output(attention), outputs, atol=1e-5)
    np.testing.assert_array_equal(said, same)
    with pytest.raises(ValueError, match="SegmentMean has no attention to keep"):
        denoiser().with_outputs(IMAGES, TIMES, CLASSES, "attention")


@pytest.mark.slow
def test_a_video_is_cut_into_patches_of_frames_rows_and_columns():
    model = randomised(
        lambda: denoiser(depth=1, patch_frames=2, frames=4, pattern=("segment_mean",))
    )
    videos = RNG.standard_normal((2, 4, 4, 6, 3)).astype(np.float32)
    patches = videos.reshape(2, 2, 2, 2, 2, 3, 2, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    embedding = model.embedding
    x = patches.reshape(2, 12, 24) @ array(embedding.map.kernel) + array(embedding.map.bias)
    frames = np.repeat(waves([0, 1], 8), 6, axis=0)
    rows, columns = waves([0, 0, 0, 1, 1, 1] * 2, 4), waves([0, 1, 2] * 4, 4)
    want = x + frames + np.concatenate((columns, rows), axis=-1)
    got, said = jax.jit(lambda m, v: (m.embedding(v), m(v, TIMES, CLASSES)))(model, videos)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert said.shape == (2, 4, 4, 6, 6)
    np.testing.assert_array_equal(
        from_patches(to_patches(videos, (2, 2, 2)), (2, 2, 3), (2, 2, 2)), videos
    )


# Table 1 and Table 4 of the paper, patches of 2 x 2 on latents of 32 x 32 x 4.
PUBLISHED_MILLIONS = {"small": 33, "base": 130, "large": 458, "xlarge": 675}


@pytest.mark.parametrize("size", PUBLISHED_MILLIONS)
def test_the_sizes_have_the_published_numbers_of_parameters(size):
    width, depth, heads = SIZES[size]
    options = {"width": width, "depth": depth, "pattern": ("vit",)}

    def made():
        model = denoiser(32, 32, 4, 1000, mixers={"vit": {"heads": heads}}, **options)
        return nnx.state(model, nnx.Param)

    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.eval_shape(made)))
    assert round(count / 1e6) == PUBLISHED_MILLIONS[size]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: denoiser(rows=5), "must be multiples of patch=2; got 5 x 6"),
        (lambda: denoiser(frames=3, patch_frames=2), r"patch\)=\(2, 2, 2\); got 3 x 4 x 6"),
        (lambda: denoiser(patch_frames=2), "patch_frames must be 1 for images; got 2"),
        (lambda: denoiser(columns=0), "must be multiples of patch=2; got 4 x 0"),
        (lambda: denoiser(patch=0), r"config.model.patch must be an integer in \[1, 2\^31\)"),
        (lambda: denoiser(width=6), "width must be a multiple of 4 for positions=.*; got 6"),
        (lambda: denoiser(pre_norm=False), "pre_norm must be True with a condition"),
        (lambda: denoiser()(IMAGES[..., :2], TIMES, CLASSES), r"\[B, height, width, 3\] .* got"),
        (lambda: denoiser()(IMAGES, TIMES[:1], CLASSES), r"times must be \[B\] with B=2 .*\(1,\)"),
        (lambda: denoiser()(IMAGES, TIMES, CLASSES[:, None]), r"classes must be \[B\] with B=2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(attempt, message):
    with pytest.raises(ValueError, match=message) as raised:
        attempt()
    assert "\n" not in str(raised.value)
