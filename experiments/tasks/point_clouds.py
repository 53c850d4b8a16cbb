"""Point clouds as sparse voxels, several to a row: the class of every voxel, or of every cloud.

    voxels [T, F]         mean place of the points within the voxel (3), log(1 + their number), and
                          means of what else is known of them, such as an intensity
    coordinates [T, 3]    the voxel's cell (x, y, z)
    segment_ids [T]       its cloud within the row, 0 .. S - 1
    mask [T]              where there is a voxel; clouds follow each other, then come empty places
    labels, weights       [T] of voxels, or [S] of clouds

Without `data_dir` the clouds are generated (sources/shapes.py), S to a row: eight shapes, and
clutter as a ninth class of voxels. A cloud has a random share of the row's T places, and where it
has more voxels some of them are left out, at random. Files are as in sources/point_files.py, and a
row has as many clouds as fit, in the order of their names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments.objectives.classification import Classification
from experiments.objectives.objective import Objective
from experiments.objectives.segmentation import Segmentation
from experiments.tasks.sources.point_files import SUFFIXES, Cloud, Points, read_points, voxelise
from experiments.tasks.sources.shapes import CLUTTER, SHAPES, draw_cloud
from experiments.training.task import Batch, Examples, Task
from models.parts.options import Count, Factor, Probability, Range, Size, Weight, check_choice

SPLITS = ("train", "validation", "test")
Side = Annotated[int, Range(1, 2**15)]
Places = Annotated[int, Range(1, 2**20)]
Clouds = Annotated[int, Range(1, 2**12)]


@dataclass(frozen=True)
class Row:
    """How a row is made: T places, at most S clouds, labels of voxels or of clouds."""

    places: int
    clouds: int
    per_voxel: bool
    channels: int

    def pack(self, clouds: Sequence[Cloud], labels: Sequence[int]) -> Batch:
        """The arrays of one row, without a batch axis; `labels` are those of clouds, unless voxels
        have them."""
        T, S = self.places, self.clouds
        batch = {
            "voxels": np.zeros((T, self.channels), np.float32),
            "coordinates": np.zeros((T, 3), np.int32),
            "segment_ids": np.full(T, S - 1, np.int32),
            "mask": np.zeros(T, bool),
            "labels": np.zeros(T if self.per_voxel else S, np.int32),
            "weights": np.zeros(T if self.per_voxel else S, np.float32),
        }
        first = 0
        for number, cloud in enumerate(clouds):
            rows = slice(first, first + len(cloud.places))
            first = rows.stop
            batch["voxels"][rows] = cloud.features
            batch["coordinates"][rows] = cloud.places
            batch["segment_ids"][rows], batch["mask"][rows] = number, True
            where = rows if self.per_voxel else number
            batch["labels"][where] = cloud.labels if self.per_voxel else labels[number]
            batch["weights"][where] = 1.0
        return batch


def make(
    data_dir: str = "",
    labels: str = "voxel",
    grid: tuple[Side, Side, Side] = (32, 32, 16),
    voxels: Places = 2_048,
    clouds: Clouds = 4,
    shapes: Annotated[int, Range(1, 1000)] = 3,
    radius: tuple[Factor, Factor] = (4.0, 7.0),
    noise: Weight = 0.2,
    occlusion: Probability = 0.3,
    clutter: Probability = 0.1,
    rotated: bool = True,
    test_examples: Size = 64,
    voxel_size: Factor = 0.1,
    origin: tuple[float, ...] = (),
    crop: bool = False,
    ignored: tuple[Count, ...] = (),
) -> Task:
    """Evaluations "validation" and "test".

    data_dir        "": shapes are generated; or a directory with folders train, validation and test
    labels          "voxel", of a cloud's points; or "cloud"
    grid            cells (X, Y, Z)
    voxels, clouds  of a row: T, and S at most

    Of shapes that are generated (sources/shapes.py):

    shapes          of a cloud, from 1 to this; of labels="cloud" there is one
    radius, noise, occlusion, clutter, rotated
    test_examples   rows of each evaluation

    Of files; those of labels="cloud" lie in a folder for each class, as train/chair/1.ply:

    voxel_size, origin, crop    as in `voxelise` (sources/point_files.py)
    ignored                     labels of voxels that do not count

    Metrics: loss and accuracy, of voxels with mean_iou. Raises ValueError for files that are not
    there or not as they should be, with file and row."""
    check_choice("task.labels", labels, ("voxel", "cloud"))
    per_voxel = labels == "voxel"
    if origin and len(origin) != 3:
        raise ValueError(f"task.origin must be (x, y, z) or (); got {origin}")
    row = Row(voxels, clouds, per_voxel, channels=4)
    if data_dir:
        options = {"voxel_size": voxel_size, "origin": origin, "crop": crop}
        return _of_files(Path(data_dir).expanduser(), row, grid, tuple(ignored), options)
    if not radius[0] <= radius[1] <= min(grid) / 2:
        raise ValueError(
            "task.radius must be (from, to) in ascending order and at most half of the least extent"
            f" of task.grid={grid}; got {radius}"
        )
    if voxels < 2 * clouds:
        raise ValueError(
            f"task.voxels must be at least two for each of task.clouds={clouds}; got {voxels}"
        )

    def one_cloud(random: np.random.Generator, most: int) -> tuple[Cloud, int]:
        places, kinds = draw_cloud(
            random,
            grid,
            shapes=int(random.integers(1, shapes + 1)) if per_voxel else 1,
            radius=radius,
            noise=noise,
            occlusion=occlusion,
            clutter=clutter,
            rotated=rotated,
        )
        points = Points(places, np.zeros((len(places), 0), np.float32), kinds)
        cloud = voxelise("generated", points, grid, voxel_size=1.0, origin=(0.0, 0.0, 0.0))
        return _some(random, cloud, most), int(kinds[0])

    def generated(stream: str, length: int | None = None) -> Examples:
        def one(index: int) -> Batch:
            digest = hashlib.sha256(f"point_clouds/{stream}/{index}".encode()).digest()
            random = np.random.default_rng(int.from_bytes(digest[:16]))
            share = 0.5 + random.random(clouds)
            most = np.maximum((voxels * share / share.sum()).astype(int), 1)
            drawn = [one_cloud(random, n) for n in most.tolist()]
            return row.pack([cloud for cloud, _ in drawn], [kind for _, kind in drawn])

        return Examples(lambda indices: _stacked([one(int(index)) for index in indices]), length)

    return Task(
        sizes=_sizes(row, grid, len(SHAPES) + per_voxel),
        train=lambda seed: generated(f"train/{seed}"),
        evaluations={split: generated(split, test_examples) for split in SPLITS[1:]},
        objective=_objective(row, len(SHAPES) + per_voxel),
        provenance={"clouds": "generated", "classes": [*SHAPES, *([CLUTTER] if per_voxel else [])]},
    )


def _sizes(row: Row, grid: tuple[int, int, int], classes: int) -> dict[str, int]:
    return {
        "classes": classes,
        "channels": row.channels,
        **dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True)),
        "clouds": row.clouds,
        "per_voxel": int(row.per_voxel),
    }


def _objective(row: Row, classes: int) -> Objective:
    return Segmentation(classes) if row.per_voxel else Classification()


def _some(random: np.random.Generator, cloud: Cloud, most: int) -> Cloud:
    """At most so many of a cloud's voxels, in the order that they had."""
    if len(cloud.places) <= most:
        return cloud
    kept = np.sort(random.choice(len(cloud.places), most, replace=False))
    return replace(
        cloud, places=cloud.places[kept], features=cloud.features[kept], labels=cloud.labels[kept]
    )


def _stacked(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _of_files(
    folder: Path,
    row: Row,
    grid: tuple[int, int, int],
    ignored: tuple[int, ...],
    options: dict[str, Any],
) -> Task:
    """The task of a directory; `row` without its channels, which the files say."""
    names = {split: clouds_in(folder / split, row.per_voxel) for split in SPLITS}
    digest = hashlib.sha256()
    clouds: dict[Path, Cloud] = {}
    for path in (path for split in SPLITS for path in names[split]):
        for file in (path, path.with_suffix(".label")):
            digest.update(file.read_bytes() if file.is_file() else b"")
        points = read_points(path, row.per_voxel)
        clouds[path] = cloud = voxelise(path, points, grid, **options)
        first = next(iter(clouds.values()))
        if cloud.features.shape[1] != first.features.shape[1]:
            raise ValueError(
                f"{path} must have {first.features.shape[1] - 4} features of a point beside x, y"
                f" and z, as other files have; got {cloud.features.shape[1] - 4}"
            )
        if len(cloud.places) > row.places:
            raise ValueError(
                f"{path} has {len(cloud.places)} voxels, more than a row has places"
                f" (task.voxels={row.places}); raise task.voxels or task.voxel_size"
            )
    row = replace(row, channels=next(iter(clouds.values())).features.shape[1])
    label_of = _labels(names["train"], clouds, row.per_voxel, ignored)
    rows = {split: _rows(names[split], clouds, row) for split in SPLITS}
    for path in clouds:
        _check_labels(path, clouds[path], label_of, row.per_voxel, ignored)

    def examples(split: str) -> Examples:
        def one(index: int) -> Batch:
            paths = rows[split][index]
            chosen = [_renamed(clouds[path], label_of) for path in paths]
            labels = [0 if row.per_voxel else label_of[path.parent.name] for path in paths]
            batch = row.pack([cloud for cloud, _ in chosen], labels)
            if row.per_voxel:
                counts = np.concatenate([counts for _, counts in chosen])
                batch["weights"][: len(counts)] = counts
            return batch

        return Examples(
            lambda indices: _stacked([one(int(index)) for index in indices]), len(rows[split])
        )

    return Task(
        sizes=_sizes(row, grid, len(label_of)),
        train=lambda seed: examples("train"),
        evaluations={split: examples(split) for split in SPLITS[1:]},
        objective=_objective(row, len(label_of)),
        provenance={
            "clouds": f"files of {folder.name}",
            "clouds_sha256": digest.hexdigest(),
            "classes": [str(label) for label in label_of],
            **{f"{split}_clouds": len(names[split]) for split in SPLITS},
        },
    )


def clouds_in(folder: Path, per_voxel: bool) -> list[Path]:
    """The files with clouds in a folder, of labels of clouds in its folders, by name. Raises
    ValueError if there are none."""
    pattern = "*" if per_voxel else "*/*"
    found = sorted(path for path in folder.glob(pattern) if path.suffix in SUFFIXES)
    if not found:
        raise ValueError(
            f"task.data_dir must have folders {', '.join(SPLITS)} with"
            f" {'files' if per_voxel else 'a folder for each class, with files'}"
            f" {', '.join(SUFFIXES)}; {folder} {'has none' if folder.is_dir() else 'is not there'}"
        )
    return found


def _labels(
    paths: Sequence[Path], clouds: dict[Path, Cloud], per_voxel: bool, ignored: tuple[int, ...]
) -> dict[Any, int]:
    """The class of each label that training has: an int, or the name of a folder."""
    if per_voxel:
        found = {int(label) for path in paths for label in np.unique(clouds[path].labels)}
        labels: list[Any] = sorted(found - set(ignored))
    else:
        labels = sorted({path.parent.name for path in paths})
    if len(labels) < 2:
        raise ValueError(f"{paths[0].parent} must have two classes or more; got {labels}")
    return {label: number for number, label in enumerate(labels)}


def _check_labels(
    path: Path, cloud: Cloud, label_of: dict[Any, int], per_voxel: bool, ignored: tuple[int, ...]
) -> None:
    own = np.unique(cloud.labels).tolist() if per_voxel else [path.parent.name]
    for label in own:
        if label not in label_of and label not in ignored:
            raise ValueError(
                f"{path} has the label {label!r}, which no file of train has; those are"
                f" {', '.join(map(str, label_of))}"
            )


def _renamed(cloud: Cloud, label_of: dict[Any, int]) -> tuple[Cloud, np.ndarray]:
    """The cloud with classes as labels, and which of its voxels count, [v]."""
    classes = np.array([label_of.get(int(label), -1) for label in cloud.labels], np.int32)
    return replace(cloud, labels=np.maximum(classes, 0)), classes >= 0


def _rows(paths: Sequence[Path], clouds: dict[Path, Cloud], row: Row) -> list[list[Path]]:
    """The clouds of each row: as many as fit, in their order."""
    rows: list[list[Path]] = []
    room = -1
    for path in paths:
        size = len(clouds[path].places)
        if size > room or len(rows[-1]) == row.clouds:
            rows.append([])
            room = row.places
        rows[-1].append(path)
        room -= size
    return rows
