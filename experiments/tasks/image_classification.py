"""Classification of images as images: pixels [height, width, channels], then a class.

experiments/tasks/images.py has the same sets as sequences of pixels."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from experiments.objectives.classification import Classification
from experiments.objectives.evaluation import Sums
from experiments.tasks.sources import augmentations
from experiments.tasks.sources.image_sets import Images, image_set, in_grey
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Probability, Range, Weight, check_choice

Side = Annotated[int, Range(1, 4096)]
SideOrDefault = Annotated[int, Range(0, 4096)]
STREAM = 0x1A6E  # of a seed's random numbers: what augmentations draw
EVALUATED = ("validation", "test")
Random = np.random.Generator


def make(
    dataset: str = "digits",
    size: SideOrDefault = 0,
    grey: bool = False,
    crop: str = "none",
    padding: SideOrDefault = 4,
    flip: bool = False,
    rand_augment: tuple[float, ...] = (),
    erasing: Probability = 0.0,
    mixup: Weight = 0.0,
    cutmix: Weight = 0.0,
    label_smoothing: Probability = 0.0,
    enlarged: tuple[Side, ...] = (),
    test_split: str = "test",
    data_dir: str = "~/tensorflow_datasets",
    download: bool = False,
) -> Task:
    """Examples of an image data set; evaluations "validation" and "test".

    dataset, data_dir, download
                     as `image_set`
    test_split       of a TFDS data set, the one that is "test" here: ImageNet's has no labels, and
                     its "validation" serves
    size             rows and columns; 0: those of the data set. What all has one size is resized as
                     a whole, of photographs the middle
    grey             one channel of colour images, their luma
    crop             of training images: "none", "padded" (moved by up to `padding` pixels) or
                     "resized" (a random part)
    flip             half of them mirrored
    rand_augment     (operations, magnitude out of 10, its standard deviation), or ()
    erasing          probability of a rectangle of noise
    mixup, cutmix    parameters of the Beta distributions of shares; 0: off. An image is mixed with
                     another one of the training split
    label_smoothing  of the training loss
    enlarged         further sizes to which the test images are resized, for evaluations
                     "test_at_<size>"

    Pixels are scaled to [-1, 1]. Splits as in experiments/tasks/images.py. What becomes of an image
    follows from seed, epoch and the image's number, whatever the batch is. Metrics: loss, accuracy.

    Raises ValueError for a data set that is not known or not there and for options that it does not
    allow, ImportError for one whose package is not installed."""
    check_choice("crop", crop, ("none", "padded", "resized"))
    if len(rand_augment) not in (0, 3):
        raise ValueError(
            "rand_augment must be () or (operations, magnitude, standard deviation); got"
            f" {rand_augment!r}"
        )
    source = image_set(dataset, data_dir, download, test_split=test_split, of_any_size=size > 0)
    if grey:
        source = in_grey(source)
    rows, columns = (size, size) if size else source.shape[:2]
    changes = Changes(crop, padding, flip, rand_augment, erasing, mixup, cutmix)
    return Task(
        sizes={
            "classes": source.classes,
            "channels": 1 if len(source.shape) == 2 else source.shape[2],
            "height": rows,
            "width": columns,
        },
        train=lambda seed: training_images(source, rows, columns, changes, seed),
        evaluations={
            name: Sums(images_of(source, split, *shape), Classification())
            for name, split, shape in (
                *((split, split, (rows, columns)) for split in EVALUATED),
                *((f"test_at_{side}", "test", (side, side)) for side in enlarged),
            )
        },
        objective=Classification(label_smoothing),
        provenance={
            "images": source.origin,
            "train_images": len(source.splits["train"][0]),
            "images_sha256": source.sha256,
        },
    )


@dataclass(frozen=True)
class Changes:
    """What training makes of images; the options of `make`."""

    crop: str = "none"
    padding: int = 0
    flip: bool = False
    rand_augment: tuple[float, ...] = ()
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def seen(
        self, source: Images, image: np.ndarray, random: Random, rows: int, columns: int
    ) -> np.ndarray:
        """One image before it is mixed: float32 [rows, columns, C]."""
        image = _bytes(source, image)
        if self.crop == "resized":
            image = augmentations.resized_crop(image, random, rows, columns)
        else:
            image = _fitted(source, image, rows, columns)
        if self.crop == "padded":
            image = augmentations.padded_crop(image, random, self.padding)
        if self.flip:
            image = augmentations.flipped(image, random)
        if self.rand_augment:
            operations, magnitude, deviation = self.rand_augment
            image = augmentations.rand_augment(
                image, random, round(operations), magnitude, deviation
            )
        return augmentations.erased(_scaled(image), random, self.erasing)


def training_images(
    source: Images, rows: int, columns: int, changes: Changes, seed: int
) -> Examples:
    """The images of the split "train", changed anew in every epoch."""
    numbers, read = source.splits["train"]

    def raw(indices: np.ndarray) -> Batch:
        return _labelled(*read(numbers[indices]))

    def augment(batch: Batch, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        # An image has a stream of its own in each epoch, whatever batch and process it is in.
        generators = [
            np.random.default_rng((seed, STREAM, int(epoch), int(index)))
            for epoch, index in zip(epochs, indices, strict=True)
        ]

        def seen(images: np.ndarray) -> list[np.ndarray]:
            return [
                changes.seen(source, image, random, rows, columns)
                for image, random in zip(images, generators, strict=True)
            ]

        images, labels = seen(batch["image"]), batch["labels"]
        if changes.mixup or changes.cutmix:
            others = raw(np.array([random.integers(len(numbers)) for random in generators]))
            pairs = [
                augmentations.mixed(image, other, random, changes.mixup, changes.cutmix)
                for image, other, random in zip(
                    images, seen(others["image"]), generators, strict=True
                )
            ]
            images = [image for image, _ in pairs]
            share = np.array([share for _, share in pairs], np.float32)[:, None]
            of_class = np.eye(source.classes, dtype=np.float32)
            labels = share * of_class[labels] + (1 - share) * of_class[others["labels"]]
        return {**batch, "image": np.stack(images), "labels": labels}

    return Examples(raw, len(numbers), augment)


def images_of(source: Images, split: str, rows: int, columns: int) -> Examples:
    """The images of a split as they are; their labels are not smoothed."""
    numbers, read = source.splits[split]

    def fetch(indices: np.ndarray) -> Batch:
        images, labels = read(numbers[indices])
        fitted = [_fitted(source, _bytes(source, image), rows, columns) for image in images]
        return _labelled(np.stack([_scaled(image) for image in fitted]), labels)

    return Examples(fetch, len(numbers))


def _labelled(images: np.ndarray, labels: np.ndarray) -> Batch:
    weights = np.ones(len(labels), np.float32)
    return {"image": images, "labels": labels.astype(np.int32), "weights": weights}


def _bytes(source: Images, image: np.ndarray) -> np.ndarray:
    """An image as uint8, 0 to 255 whatever the number of grey levels."""
    return (image.astype(np.int64) * 255 // (source.brightness - 1)).astype(np.uint8)


def _fitted(source: Images, image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if source.of_one_size:
        return augmentations.resized(image, rows, columns)
    return augmentations.centre_crop(image, rows, columns)


def _scaled(image: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1], [H, W, C]."""
    scaled = image.astype(np.float32) / 127.5 - 1
    return scaled if scaled.ndim == 3 else scaled[:, :, None]
