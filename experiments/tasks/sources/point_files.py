"""Point clouds as voxels, and the files that they are read from.

    .npy    an array [n, 3 + F] of x, y, z and F features of each point; of integers: voxels
            already, in cells of the grid
    .ply    vertices with x, y, z; other scalar properties are features, in the order of their
            names, but for `label`, which is the point's
    .bin    float32 x, y, z and intensity, as in KITTI (Geiger et al., CVPR 2012)

Labels of points that are not in the file are in <name>.label beside it, uint32 for each point, of
which the lower 16 bits count, as in SemanticKITTI (Behley et al., ICCV 2019)."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from trimesh.exchange.ply import load_ply

SUFFIXES = (".npy", ".ply", ".bin")
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Points:
    """places [n, 3], float64 in units of the file, or int64 in cells of the grid; features [n, F],
    float32; labels [n], int64, zeros where there are none."""

    places: np.ndarray
    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Cloud:
    """places [v, 3], int32, of a cloud's voxels, each once; features [v, F] float32; labels [v],
    int32: of most of a voxel's points, the smallest of several such. `voxel_of` [n]: of each point
    its voxel, -1 for one that was left out."""

    places: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    voxel_of: np.ndarray


def read_points(path: Path, labelled: bool) -> Points:
    """The points of a file, with labels if `labelled`.

    Raises ValueError, naming file and row, for one that is no such file, damaged, empty, of other
    columns or with coordinates or features that are not finite."""
    try:
        content = path.read_bytes()
        places, features, labels = {".npy": _npy, ".ply": _ply, ".bin": _bin}[path.suffix](content)
    except (OSError, ValueError, EOFError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or no point cloud: {error}") from error
    if not len(places):
        raise ValueError(f"{path} must have a point; it is empty")
    for name, numbers in (("coordinates", places), ("features", features)):
        if len(bad := np.flatnonzero(~np.isfinite(numbers).all(axis=1))):
            raise ValueError(
                f"{path}, row {bad[0]}: {name} must be finite; got {numbers[bad[0]].tolist()}"
            )
    beside = path.with_suffix(".label")
    if labelled and labels is None:
        if not beside.is_file():
            raise ValueError(f"{path} has no label, and there is no {beside}")
        labels = np.fromfile(beside, np.uint32).astype(np.int64) & 0xFFFF
    if not labelled or labels is None:
        labels = np.zeros(len(places), np.int64)
    if len(labels) != len(places):
        raise ValueError(f"{beside} must have {len(places)} labels as {path}; got {len(labels)}")
    return Points(places, features.astype(np.float32), labels)


def voxelise(
    path: Path | str,
    points: Points,
    grid: Grid,
    *,
    voxel_size: float,
    origin: tuple[float, ...] = (),
    crop: bool = False,
) -> Cloud:
    """The voxels of points. A voxel's features are the mean place of its points within it, along
    each axis in [-1/2, 1/2], log(1 + their number), and the means of their own features.

    voxel_size, origin    a point p is in the cell floor((p - origin) / voxel_size); (): the lowest
                          corner of the cloud. Points of integers are cells already
    crop                  points outside of the grid are left out; they are refused otherwise

    Raises ValueError, naming `path` and the row."""
    if np.issubdtype(points.places.dtype, np.integer):
        within = points.places + 0.5
    else:
        lowest = np.array(origin) if origin else points.places.min(axis=0)
        within = (points.places - lowest) / voxel_size
    inside = np.all((within >= 0) & (within < np.array(grid)), axis=1)
    if not (inside.any() if crop else inside.all()):
        row = int(np.flatnonzero(~inside)[0])
        below = (within[row] < 0).any()
        raise ValueError(
            f"{path}, row {row}: {points.places[row].tolist()} is"
            f" {'negative, counted from the origin' if below else 'beyond the grid'}; cells must be"
            f" in 0..{tuple(side - 1 for side in grid)} (task.grid, task.voxel_size, task.origin),"
            " unless task.crop leaves out what is not"
        )
    within, features = within[inside], points.features[inside]
    cell = np.floor(within).astype(np.int64)
    number = (cell[:, 0] * grid[1] + cell[:, 1]) * grid[2] + cell[:, 2]
    cells, first, voxel, count = np.unique(
        number, return_index=True, return_inverse=True, return_counts=True
    )
    columns = np.concatenate([within - cell - 0.5, features], axis=1)
    means = np.stack(
        [np.bincount(voxel, column, len(cells)) / count for column in columns.T], axis=1
    )
    means = np.insert(means, 3, np.log1p(count), axis=1)
    labels = _most(points.labels[inside], voxel, len(cells))
    voxel_of = np.full(len(inside), -1)
    voxel_of[inside] = voxel
    return Cloud(cell[first].astype(np.int32), means.astype(np.float32), labels, voxel_of)


def _most(labels: np.ndarray, voxel: np.ndarray, voxels: int) -> np.ndarray:
    """The label of most points of each voxel."""
    pairs, count = np.unique(np.stack([voxel, labels], axis=1), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -count, pairs[:, 0]))
    first = np.unique(pairs[order, 0], return_index=True)[1]
    assert len(first) == voxels
    return pairs[order][first, 1].astype(np.int32)


def _npy(content: bytes) -> tuple[np.ndarray, np.ndarray, None]:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.ndim != 2 or array.shape[1] < 3:
        raise ValueError(f"it must be [n, 3] or wider; got {array.shape}")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it must hold numbers; got {array.dtype}")
    places = array[:, :3].astype(np.float64 if array.dtype.kind == "f" else np.int64)
    return places, array[:, 3:].astype(np.float64), None


def _ply(content: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    vertices = load_ply(io.BytesIO(content))["metadata"]["_ply_raw"]["vertex"]
    if not vertices["length"]:
        return np.zeros((0, 3)), np.zeros((0, 0)), None
    names = list(vertices["properties"])
    if missing := [name for name in "xyz" if name not in names]:
        raise ValueError(f"its vertices have no property {missing[0]!r}; they have {names}")
    columns = {name: np.ravel(vertices["data"][name]) for name in names}
    for name, column in columns.items():
        if len(column) != vertices["length"]:
            raise ValueError(f"it must have {vertices['length']} numbers {name}; got {len(column)}")
    labels = columns.get("label")
    own = sorted(set(names) - {"x", "y", "z", "label"})
    places = np.stack([columns[name] for name in "xyz"], axis=1).astype(np.float64)
    features = [columns[name].astype(np.float64) for name in own]
    return (
        places,
        np.stack(features, axis=1) if own else np.zeros((len(places), 0)),
        None if labels is None else labels.astype(np.int64),
    )


def _bin(content: bytes) -> tuple[np.ndarray, np.ndarray, None]:
    if len(content) % 16:
        raise ValueError(f"it must have 16 bytes for each point; got {len(content)} bytes")
    array = np.frombuffer(content, "<f4").reshape(-1, 4).astype(np.float64)
    return array[:, :3], array[:, 3:], None
