"""A folded classifier says what it said before."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.blocks.backbone import Identity
from models.blocks.folding import fold_norms
from models.networks.image_classifier import build
from tests.support.layers import FLOAT32

IMAGES = np.random.default_rng(0).standard_normal((3, 4, 4, 1)).astype(np.float32)
LATER = ({"width": 12, "depth": 1, "mlp": "swiglu"},)


def classifier(**model: Any) -> Any:
    """A classifier whose norms have seen something, in evaluation mode."""
    config = {"width": 8, "depth": 2, "pattern": ("slab",), "mixers": {"slab": {"heads": 2}}}
    config |= {"mlp": "gelu", "patch": 1, "norm": "progressive_batch"}
    sizes = {"classes": 3, "channels": 1, "height": 4, "width": 4}
    built = build(config | model, rngs=nnx.Rngs(0), **sizes, **FLOAT32)
    rng = np.random.default_rng(1)
    for kind, centre in ((nnx.Param, 0.0), (nnx.BatchStat, 1.0)):
        for path, variable in nnx.to_flat_state(nnx.state(built, kind)):
            noise = rng.uniform(-0.4, 0.4, variable.shape) + centre * (path[-1] == "var")
            variable[...] += jnp.asarray(noise, jnp.float32)
    built.eval()
    return built


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm",
    [
        *(pytest.param(norm, marks=pytest.mark.full) for norm in ("batch", "rep_batch")),
        "progressive_batch",
    ],
)
def test_a_folded_classifier_gives_the_same_logits_without_norms(norm):
    model = classifier(norm=norm, stages=LATER)
    want = np.asarray(model(IMAGES))
    fold_norms(model)
    np.testing.assert_allclose(model(IMAGES), want, atol=2e-5 * np.abs(want).max())
    blocks = [*model.stack.period, *model.stages[0].stack.period]
    norms = [model.norm, *(n for b in blocks for n in (b.mixer_norm, b.mlp_norm))]
    assert all(isinstance(n, Identity) for n in norms)
    assert np.abs(want - want.mean(0)).max() > 0.01  # the images differ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "only norms of batches fold: .*; got LayerNorm"),
        ({"pattern": ("vig",), "mixers": {"vig": {"size_per_head": 4}}}, "ViGMixer does not name"),
        ({"pre_norm": False}, "pre_norm must be True"),
    ],
)
def test_what_does_not_fold_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fold_norms(classifier(**options))
