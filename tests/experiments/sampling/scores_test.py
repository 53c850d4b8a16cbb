"""Scores of pictures against what is known of Gaussians, and by a classifier."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.objectives.classification import Classification
from experiments.objectives.evaluation import Sums
from experiments.sampling.scores import frechet_distance, scores
from experiments.training.task import from_arrays

RNG = np.random.default_rng(0)


def test_the_distance_is_that_of_gaussians():
    a = RNG.standard_normal((500, 3)) @ RNG.standard_normal((3, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    # Scaled by c, the covariances commute: tr (1 - c)^2 S.
    centred = a - a.mean(axis=0)
    want = 0.25 * np.trace(np.cov(a.T))
    assert frechet_distance(centred, 1.5 * centred) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4)


class Bright(nnx.Module):
    """Takes a picture for class 1 where it is bright."""

    def features(self, image):
        return image.reshape(len(image), -1)

    def head(self, features):
        mean = features.mean(axis=1)
        return jnp.stack((-mean, mean), axis=1)


def classifier(real: np.ndarray, **config: Any) -> Any:
    graphdef, state = nnx.split(Bright())
    examples = from_arrays({"image": real})
    return SimpleNamespace(
        task=SimpleNamespace(
            sizes={"classes": 2, "height": 2, "width": 2, "channels": 1},
            evaluation=lambda name: Sums(examples, Classification()),
        ),
        config=SimpleNamespace(
            model=SimpleNamespace(name=config.get("model", "image_classifier")),
            task=SimpleNamespace(name="image_classification"),
        ),
        blueprint=SimpleNamespace(graphdef=graphdef),
        replica=lambda place: (state, nnx.State({})),
    )


def test_pictures_are_scored_by_what_they_were_to_be():
    real = RNG.standard_normal((300, 2, 2, 1)).astype(np.float32)
    pictures = np.full((4, 2, 2, 1), 0.5, np.float32) * np.array([1, -1, 1, 1])[:, None, None, None]
    found = scores(classifier(real), pictures, np.array([1, 0, 0, 2]))
    assert found.class_accuracy == pytest.approx(2 / 3)  # the last was to be nothing
    own, others = (x.reshape(len(x), -1) for x in (pictures, real))
    assert found.frechet_distance == pytest.approx(frechet_distance(own, others), rel=1e-6)
    assert 0 < found.of_real < 0.3
    ordered = real[np.argsort(real.mean(axis=(1, 2, 3)))]
    assert scores(classifier(ordered), pictures, np.zeros(4, int)).of_real < 0.3
    assert np.isnan(scores(classifier(real), pictures, np.full(4, 2)).class_accuracy)


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        ({"model": "lm"}, (4, 2, 2, 1), "must hold a run of image_classifier .*; it has lm on"),
        ({}, (4, 3, 2, 1), r"images like the pictures, \(3, 2, 1\); it reads \(2, 2, 1\)"),
        ({}, (1, 2, 2, 1), "needs at least 2 pictures; got 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(given, shape, message):
    real = np.zeros((4, 2, 2, 1), np.float32)
    with pytest.raises(ValueError, match=message):
        scores(classifier(real, **given), np.zeros(shape, np.float32), np.zeros(shape[0], int))
