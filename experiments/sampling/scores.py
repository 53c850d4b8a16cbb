"""How good pictures are, in the eyes of a classifier that was trained here.

The distance is Frechet's between Gaussians (Dowson and Landau, 1982; of features of images: Heusel
et al., NeurIPS 2017, arXiv 1706.08500), but of the features of this classifier: it is no FID, whose
classifier is Inception, and compares with no published number."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.objectives.evaluation import Sums
from experiments.training.run_loading import LoadedRun

BATCH = 256


class Scores(NamedTuple):
    """class_accuracy    the share of pictures that the classifier takes for what they were to be;
                      NaN if they were to be nothing
    frechet_distance  between the features of the pictures and of test images
    of_real           the same between two random halves of the test images: what is left at best
    """

    class_accuracy: float
    frechet_distance: float
    of_real: float


def scores(classifier: LoadedRun, pictures: np.ndarray, classes: np.ndarray) -> Scores:
    """The scores of pictures [n, Y, X, C] of classes [n], where those beyond the classifier's are
    none. Raises ValueError for a run that classifies no images, or others."""
    sizes, config = classifier.task.sizes, classifier.config
    if config.model.name != "image_classifier" or config.task.name != "image_classification":
        raise ValueError(
            "--classifier must hold a run of image_classifier on image_classification; it has"
            f" {config.model.name} on {config.task.name}"
        )
    wanted = tuple(sizes[name] for name in ("height", "width", "channels"))
    if pictures.shape[1:] != wanted:
        raise ValueError(
            f"--classifier must read images like the pictures, {pictures.shape[1:]}; it reads"
            f" {wanted}"
        )
    if len(pictures) < 2:
        raise ValueError(f"--classifier needs at least 2 pictures; got {len(pictures)}")
    test = classifier.task.evaluation("test")
    assert isinstance(test, Sums)
    real = test.examples.fetch(np.arange(test.examples.length))["image"]
    features, logits = _features(classifier, pictures)
    features_real, _ = _features(classifier, real)
    # Sets lie in an order of their own: every second image may be of other classes.
    shuffled = np.random.default_rng(0).permutation(features_real)
    asked = classes < sizes["classes"]
    right = logits.argmax(axis=-1)[asked] == classes[asked]
    return Scores(
        class_accuracy=float(right.mean()) if asked.any() else float("nan"),
        frechet_distance=frechet_distance(features, features_real),
        of_real=frechet_distance(*np.array_split(shuffled, 2)),
    )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the means and covariances of features
    [n, D] and [m, D], float64. It falls with the numbers of rows: compare equal ones."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    # tr (S_a S_b)^(1/2) = tr (R S_b R)^(1/2) with R R = S_a, whose eigenvalues are real.
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ second @ root)
    apart = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    traces = np.trace(first) + np.trace(second)
    return float(apart + traces - 2 * np.sqrt(np.maximum(mixed, 0)).sum())


def _features(classifier: LoadedRun, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the head reads [n, D] and what it says [n, classes], in batches of one shape."""
    graphdef, weights = classifier.blueprint.graphdef, classifier.replica(0)

    @jax.jit
    def of(weights: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = nnx.merge(graphdef, *weights)
        model.eval()
        features = model.features(batch)
        return features, model.head(features)

    found = []
    for first in range(0, len(images), BATCH):
        part = images[first : first + BATCH]
        filled = np.concatenate((part, np.zeros((BATCH - len(part), *part.shape[1:]), part.dtype)))
        found.append([np.asarray(each)[: len(part)] for each in of(weights, filled)])
    features, logits = (np.concatenate(each) for each in zip(*found, strict=True))
    return features, logits
