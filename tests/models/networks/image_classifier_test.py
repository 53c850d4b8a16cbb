"""Images as tokens, pyramids, positions of another size, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.patches import Tokens, stem_convolutions
from models.networks.image_classifier import build
from models.parts.positions import resized_table
from tests.support.layers import FLOAT32, array, randomised, rms
from tests.support.mixers import SegmentMean, add_mixers

IMAGES = np.random.default_rng(0).standard_normal((2, 8, 16, 3)).astype(np.float32)
LATER = ({"width": 12, "depth": 2, "drop_path": 0.6}, {"width": 8, "depth": 1})


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_mixers(monkeypatch, segment_mean=SegmentMean)


def classifier(height: int = 8, width: int = 16, channels: int = 3, **model: Any) -> Any:
    config = {"width": 8, "depth": 1, "pattern": ("segment_mean",), "mlp": "none", "patch": 2}
    sizes = {"classes": 5, "channels": channels, "height": height, "width": width}
    return build(config | model, rngs=nnx.Rngs(0, dropout=1), **sizes, **FLOAT32)


def test_the_logits_are_the_mean_over_normalised_tokens_of_patches():
    model = randomised(classifier)
    patches = IMAGES.reshape(2, 4, 2, 8, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 12)
    conv = model.embedding.layers[0]
    x = patches @ array(conv.kernel).reshape(12, 8) + array(conv.bias)
    x = x + array(model.embedding.positions_PD)
    x = np.asarray(model.stack(jnp.asarray(x, jnp.float32), None)[0], np.float64)
    pooled = rms(x, array(model.norm.scale)).mean(axis=1)
    want = pooled @ array(model.head.kernel) + array(model.head.bias)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, IMAGES), want, atol=2e-5)


@pytest.mark.slow
def test_a_class_token_is_read_alone_and_stands_in_the_last_stage():
    model = classifier(pooling="class_token", stages=LATER)
    assert model.embedding.class_1D is None and model.stages[0].embedding.class_1D is None
    seen = []
    model.head = lambda x: seen.append(x.shape) or x
    model(IMAGES)
    assert seen == [(2, 8)]
    assert model.stages[1].embedding.class_1D.shape == (1, 8)


def test_every_stage_is_given_its_grid_and_its_place_in_the_network(monkeypatch):
    grids = []

    class OfGrid(SegmentMean):
        def __call__(self, x, state=None, *, grid, positions=None, segment_ids=None):
            grids.append((grid, x.shape))
            return super().__call__(x, state, positions=positions, segment_ids=segment_ids)

    add_mixers(monkeypatch, of_grid=OfGrid)
    model = classifier(pattern=("of_grid",), stages=LATER, drop_path=0.3)
    assert model(IMAGES).shape == (2, 5)
    shapes = [((4, 8), (2, 32, 8)), ((2, 4), (2, 8, 12)), ((1, 2), (2, 2, 8))]
    assert list(dict.fromkeys(grids)) == shapes
    # From 0 to the stage's drop_path over the four blocks of the network.
    rates = [
        model.stack.period[0].drop_path.rate[...],
        *(stage.stack.period[0].drop_path.rate[...] for stage in model.stages),
    ]
    np.testing.assert_allclose(np.concatenate(rates), [0, 0.2, 0.4, 0.3], rtol=1e-6)


@pytest.mark.parametrize("stem", ["patches", "overlapping", "halving", "halving_batch"])
def test_every_stem_makes_one_token_of_a_patch(stem):
    convolutions = stem_convolutions(stem, 4, 6)
    options: Any = {"positions": "none", "class_token": False, "rngs": nnx.Rngs(0), **FLOAT32}
    tokens = Tokens(convolutions, 3, (2, 4), **options)
    assert tokens(jnp.asarray(IMAGES)).shape == (2, 8, 6)
    size = 16
    for convolution in convolutions:
        size = convolution.extent(size)
    assert size == 4


def test_positions_are_resized_for_images_of_another_size():
    model = classifier()
    assert np.isfinite(model(np.concatenate((IMAGES, IMAGES), axis=1))).all()
    table = array(model.embedding.positions_PD)
    np.testing.assert_array_equal(resized_table(jnp.asarray(table), (4, 8), (4, 8)), table)
    steps = np.repeat(np.linspace(0, 1, 4), 8)[:, None]  # rises along the rows, not the columns
    got = np.asarray(resized_table(jnp.asarray(steps), (4, 8), (8, 16))).reshape(8, 16)
    np.testing.assert_allclose(got - got[:, :1], 0, atol=1e-6)
    assert (np.diff(got[1:-1, 0]) > 0).all()
    # Of a checkpoint that was trained on images of 16 x 16.
    finer = classifier(position_grid=(8, 8))
    assert finer.embedding.positions_PD.shape == (64, 8) and finer(IMAGES).shape == (2, 5)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: classifier(height=9), "images must be multiples of 2 .*; got 9 x 16"),
        (lambda: classifier(height=4, stages=LATER), "multiples of 8 .*2 mergings.*; got 4 x 16"),
        (lambda: classifier()(IMAGES[..., :1]), r"images must be \[B, height, width, 3\]"),
        (lambda: classifier()(IMAGES[:, :7]), "multiples of 2 .*; got 7 x 16"),
        (lambda: classifier(stem="convolution"), "stem must be one of 'patches', "),
        (lambda: classifier(stem="halving"), "patch must be 4 for stem='halving'; got 2"),
        (lambda: classifier(stem="overlapping"), "patch must be a multiple of 4"),
        (lambda: classifier(pooling="max"), "pooling must be one of 'mean', 'class_token'"),
        (lambda: classifier(position_grid=(4,)), r"position_grid must be \(\) or"),
        (
            lambda: classifier(stages=({"width": 8},)),
            r"stage 1 needs the option 'depth'; set model",
        ),
        (
            lambda: classifier(stages=({"width": 8, "depth": 1, "stem": "x"},)),
            r"stage 1 has no option 'stem'; known options in model.stages\[0\]: ",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(attempt, message):
    with pytest.raises(ValueError, match=message) as raised:
        attempt()
    assert "\n" not in str(raised.value)


def test_every_parameter_can_be_laid_over_a_mesh():
    options: Any = {"stem": "halving_batch", "patch": 4}
    model = nnx.eval_shape(lambda: classifier(16, 16, stages=LATER, **options))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        names = param.get_metadata()["out_sharding"]
        stacked = "stack" in path
        assert len(names) == len(param.shape), path
        assert not stacked or names[0] == "layers"
