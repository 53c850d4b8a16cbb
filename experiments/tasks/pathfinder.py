"""Pathfinder and Path-X of the Long Range Arena: are the two discs joined by a dashed path?

Linsley et al., NeurIPS 2018; images and settings from Tay et al., "Long Range Arena", ICLR 2021,
arXiv 2011.04006: 32 x 32 pixels (Pathfinder) or 128 x 128 (Path-X), paths of length 14, 200,000
images each. Pixels in reading order are tokens 0 .. 255, their grey level; answer 256 is no, 257
yes, asked after the last pixel.

Without `data_dir` the images are our own drawings (sources/path_drawings.py), with two discs
at ends of dashed paths, as there.

Departure: the release has one set without splits, which papers cut at random, 80 % train, 10 %
validation, 10 % test. So do we, always alike, but not into the same images."""

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from experiments.tasks.sources.class_labels import answered_by
from experiments.tasks.sources.lra_release import released
from experiments.tasks.sources.path_drawings import draw
from experiments.tasks.sources.random_streams import uniforms
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Count, Range, Size

DIFFICULTY = "curv_contour_length_14"
LEVELS = 256
HASHED_IMAGES = 64


def make(
    data_dir: str = "~/lra_release/lra_release/pathfinder32",
    size: Annotated[int, Range(1, 4096)] = 32,
    answer: str = "token",
    points: Annotated[int, Range(3, 1000)] = 7,
    distractors: Annotated[int, Range(0, 100)] = 1,
    train_examples: Count = 0,
    test_examples: Size = 2_000,
) -> Task:
    """Evaluations "validation" and "test".

    data_dir    the directory pathfinder32 or pathfinder128 of the release (lra_release.py), with
                the folder curv_contour_length_14 of imgs/<n>/sample_<m>.png and metadata/<n>.npy,
                which names them
    size        of the images: 32 or 128 as released; T is its square
    answer      "token": the answer is a token of the vocabulary, for a language model; "class": a
                label, for a network with a head of classes

    Of drawings, where data_dir is "":

    points          of the paths that discs are at; there are two, one pixel drawn and one not
                    between two points
    distractors     further paths, of half that length
    train_examples  a finite training set; 0: without end
    test_examples   of each evaluation

    Images are read one by one, when they are needed. The hash in the provenance is of the metadata,
    which name all images and their classes, and of HASHED_IMAGES of the images. Guessing has
    accuracy 0.5. Raises ValueError for files that are missing or damaged and for images of another
    size."""
    if not data_dir:
        drawn = functools.partial(_drawn, size=size, points=points, distractors=distractors)
        task = Task(
            sizes={"vocabulary": LEVELS + 2},
            train=lambda seed: Examples(drawn(f"train/{seed}"), train_examples or None),
            evaluations={
                name: Examples(drawn(name), test_examples) for name in ("validation", "test")
            },
        )
        return answered_by(answer, task, 2)
    directory = released(
        data_dir, "pathfinder32 (128 for Path-X)", (f"{DIFFICULTY}/metadata", f"{DIFFICULTY}/imgs")
    )
    folder = directory / DIFFICULTY
    names, labels, digest = _read_metadata(folder)
    # Some of the images, evenly: to read all of them takes minutes.
    for number in np.unique(np.linspace(0, len(names) - 1, HASHED_IMAGES).astype(int)):
        digest.update(_image_bytes(folder / names[number]))
    _read_image(folder / names[0], size)

    # Hashed numbers, not every tenth image: the order of the files may have to do with the class.
    order = np.argsort(uniforms("pathfinder/splits", np.arange(len(names)), 1)[:, 0], kind="stable")
    tenth = len(names) // 10
    splits = {
        "validation": order[:tenth],
        "test": order[tenth : 2 * tenth],
        "train": order[2 * tenth :],
    }

    def examples(split: str) -> Examples:
        numbers = splits[split]

        def fetch(indices: np.ndarray) -> Batch:
            chosen = numbers[indices]
            pixels = [_read_image(folder / names[number], size) for number in chosen]
            return _asked(pixels, labels[chosen])

        return Examples(fetch, len(numbers))

    task = Task(
        sizes={"vocabulary": LEVELS + 2},
        train=lambda seed: examples("train"),
        evaluations={split: examples(split) for split in ("validation", "test")},
        provenance={
            "images": f"files of {directory.name}",
            "train_images": len(splits["train"]),
            "images_sha256": digest.hexdigest(),
        },
    )
    return answered_by(answer, task, 2)


def _drawn(
    stream: str, *, size: int, points: int, distractors: int
) -> Callable[[np.ndarray], Batch]:
    """`fetch` of the drawings of a stream."""

    def fetch(indices: np.ndarray) -> Batch:
        drawings = [
            draw(random.Random(f"pathfinder/{stream}/{index}"), size, points, distractors)
            for index in indices.tolist()
        ]
        return _asked([image for image, _ in drawings], np.array([label for _, label in drawings]))

    return fetch


def _asked(images: Sequence[np.ndarray], labels: np.ndarray) -> Batch:
    """A batch that asks for the answer after the last pixel."""
    n, places = len(images), images[0].size
    return {
        "tokens": np.stack(images).reshape(n, places).astype(np.int32),
        "targets": (LEVELS + labels).reshape(n, 1).astype(np.int32),
        "weights": np.ones((n, 1), np.float32),
        "readout_positions": np.full((n, 1), places - 1, np.int32),
    }


def _read_metadata(folder: Path) -> tuple[list[str], np.ndarray, Any]:
    """Paths of all images within `folder`, their labels [n] and a hash of the metadata, to be
    updated; a line begins: folder, file, number, label."""
    # Text, in spite of the name.
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda file: file.name)
    names, labels, digest = [], [], hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(content)
        for number, line in enumerate(content.splitlines(), 1):
            words = line.split()
            if len(words) < 4 or words[3] not in (b"0", b"1"):
                raise ValueError(
                    f"{file}, line {number}: must begin with a folder, a file, a number"
                    f" and the label 0 or 1; got {line[:80]}"
                )
            names.append(b"/".join(words[:2]).decode(errors="replace"))
            labels.append(int(words[3]))
    if len(names) < 10:
        raise ValueError(
            f"{folder / 'metadata'} must hold .npy files that name at least 10 images,"
            f" so that each split has some; got {len(files)} files with {len(names)}"
        )
    return names, np.array(labels, np.int32), digest


def _image_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} must be a PNG image: {error}") from error


def _read_image(path: Path, size: int) -> np.ndarray:
    """Grey levels [size, size]."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} must be a PNG image: {error}") from error
    if pixels.shape != (size, size):
        raise ValueError(
            f"task.size must be that of the images, 32 in pathfinder32 and 128 in"
            f" pathfinder128; got {size}, and {path} is {' x '.join(map(str, pixels.shape))}"
        )
    return pixels
