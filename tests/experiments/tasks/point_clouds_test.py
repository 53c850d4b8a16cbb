"""Point clouds: shapes that are what they are called, files, rows of clouds, and what is wrong."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from experiments.tasks.point_clouds import make
from experiments.tasks.sources.point_files import Points, read_points, voxelise
from experiments.tasks.sources.shapes import SHAPES, draw_cloud, rotation

U = np.random.default_rng(0).random((4000, 3))


def distance(name: str, points: np.ndarray) -> np.ndarray:
    """How far points are from a surface, by its equation."""
    x, y, z = points.T
    r, up = np.hypot(x, y), np.abs(z)
    if name == "sphere":
        return np.abs(np.hypot(r, z) - 1)
    if name == "cube":
        return np.abs(np.abs(points).max(axis=1) - math.sqrt(1 / 3))
    if name in ("cylinder", "tube"):
        side = np.abs(r - 0.6) + np.maximum(up - 0.8, 0)
        lid = np.abs(up - 0.8) + np.maximum(r - 0.6, 0)
        return np.minimum(side, lid) if name == "cylinder" else side
    if name == "cone":
        return np.minimum(np.abs(r - 0.7 * (0.8 - z) / 1.6), np.abs(z + 0.8))
    if name == "pyramid":
        wide = np.maximum(np.abs(x), np.abs(y))
        return np.minimum(np.abs(wide - 0.8 / math.sqrt(2) * (0.75 - z) / 1.5), np.abs(z + 0.75))
    if name == "torus":
        return np.abs(np.hypot(r - 0.7, z) - 0.28)
    turns = np.arctan2(y, x)[:, None] / (2 * np.pi) + np.arange(4)  # of a helix of two
    heights = 1.6 * (turns / 2 - 0.5)
    return np.abs(np.hypot(r[:, None] - 0.6, z[:, None] - heights) - 0.12).min(axis=1)


@pytest.mark.parametrize("name", SHAPES)
def test_points_lie_on_the_surface_of_their_shape_and_all_over_it(name: str) -> None:
    points = SHAPES[name](U)
    assert distance(name, points).max() < 1e-9
    assert np.linalg.norm(points, axis=1).max() < 1.15
    assert (points.max(axis=0) > 0.27).all() and (points.min(axis=0) < -0.27).all()


@pytest.mark.parametrize("name", ["sphere", "cube", "cylinder", "tube", "pyramid", "cone"])
def test_points_are_spread_evenly(name: str) -> None:
    """Over twelve sectors about the axis and, of sectors alike, over the halves of U."""
    points = SHAPES[name](U)
    if name != "cone":
        lowest = np.mean(points[:, 2] < np.quantile(points[:, 2], 0.2) + 1e-9)
        assert lowest >= 0.2
    quarter = np.floor(np.arctan2(points[:, 1], points[:, 0]) / (np.pi / 2) + 2).astype(int) % 4
    assert np.abs(np.bincount(quarter, minlength=4) / len(U) - 0.25).max() < 0.03


def test_rotations_are_rotations() -> None:
    turned = rotation(np.random.default_rng(1))
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)


def test_a_part_of_a_shape_is_missing_and_clutter_is_added() -> None:
    given: Any = {"shapes": 1, "radius": (5, 5), "noise": 0.0, "rotated": True}
    whole, _ = draw_cloud(np.random.default_rng(2), (20,) * 3, occlusion=0, clutter=0, **given)
    cut, label = draw_cloud(
        np.random.default_rng(2), (20,) * 3, occlusion=0.9, clutter=0.5, **given
    )
    shape = label < len(SHAPES)
    assert 0.1 * len(whole) <= shape.sum() < len(whole)
    assert (~shape).sum() == shape.sum() // 2
    assert cut.min() >= 0 and cut.max() < 20


@pytest.mark.parametrize("labels", ["voxel", "cloud"])
def test_rows_are_functions_of_their_number_and_hold_each_voxel_once(labels: str) -> None:
    task: Any = make(labels=labels, grid=(16, 16, 16), radius=(3.0, 5.0), voxels=400, clouds=3)
    batch = task.evaluations["test"].fetch(np.array([3, 0, 3]))
    for array in batch.values():
        np.testing.assert_array_equal(array[0], array[2])
    other = task.train(0).fetch(np.array([3]))["coordinates"]
    assert (other != task.train(1).fetch(np.array([3]))["coordinates"]).any()
    assert (other != batch["coordinates"][:1]).any()
    mask = batch["mask"]
    assert mask.sum(axis=1).max() <= 400 and (np.diff(mask.astype(int)) <= 0).all()
    for row in range(2):
        ids = batch["segment_ids"][row][mask[row]]
        assert set(ids) == {0, 1, 2} and (np.diff(ids) >= 0).all()
        cells = np.concatenate([ids[:, None], batch["coordinates"][row][mask[row]]], axis=1)
        assert len(np.unique(cells, axis=0)) == len(cells)
        assert cells.min() >= 0 and cells[:, 1:].max() < 16
    wanted = mask if labels == "voxel" else np.ones((3, 3))
    np.testing.assert_array_equal(batch["weights"], wanted)
    assert task.sizes["classes"] == len(SHAPES) + (labels == "voxel")


def test_a_voxel_has_the_mean_place_the_number_and_the_usual_label_of_its_points() -> None:
    places = np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [0.3, 0.3, 0.1], [1.9, 0.0, 0.5]])
    points = Points(places, np.array([[1], [2], [6], [9]], np.float32), np.array([4, 2, 2, 7]))
    cloud = voxelise("file", points, (4, 4, 4), voxel_size=0.5, origin=(0.0, 0.0, 0.0))
    assert cloud.places.tolist() == [[0, 0, 0], [3, 0, 1]]
    assert cloud.labels.tolist() == [2, 7] and cloud.voxel_of.tolist() == [0, 0, 0, 1]
    want = [(0.7 / 3) / 0.5 - 0.5, (0.5 / 3) / 0.5 - 0.5, 0.2 - 0.5, math.log(4), 3.0]
    np.testing.assert_allclose(cloud.features[0], want, rtol=1e-6)
    # From its own lowest corner nothing is negative.
    moved = Points(places - 50, points.features, points.labels)
    corner = voxelise("file", moved, (4, 4, 4), voxel_size=0.5)
    assert corner.places.tolist() == [[0, 0, 0], [3, 0, 0]]


def write_ply(path: Path, rows: list[tuple[float, ...]], count: int | None = None) -> None:
    names = [f"property float {name}" for name in "xyz"]
    header = ["ply", "format ascii 1.0", f"element vertex {count or len(rows)}", *names]
    header += ["property float intensity", "property uchar label", "end_header"]
    path.write_text("\n".join([*header, *(" ".join(map(str, row)) for row in rows)]) + "\n")


def test_files_of_every_kind_are_read(tmp_path: Path) -> None:
    rows = np.array([[1, 2, 3, 0.5], [4, 5, 6, 0.25]], np.float32)
    np.save(tmp_path / "a.npy", rows)
    rows.tofile(tmp_path / "b.bin")
    write_ply(tmp_path / "c.ply", [(*rows[0], 7), (*rows[1], 9)])
    np.array([7, 9 + (3 << 16)], np.uint32).tofile(tmp_path / "b.label")
    np.array([7, 9], np.uint32).tofile(tmp_path / "a.label")
    for name in ("a.npy", "b.bin", "c.ply"):
        points = read_points(tmp_path / name, labelled=True)
        np.testing.assert_array_equal(points.places, rows[:, :3])
        np.testing.assert_array_equal(points.features, rows[:, 3:])
        assert points.labels.tolist() == [7, 9], name
    trimesh.PointCloud(rows[:, :3]).export(tmp_path / "d.ply")  # binary
    np.testing.assert_array_equal(read_points(tmp_path / "d.ply", False).places, rows[:, :3])


BAD: dict[str, tuple[Any, str]] = {
    "empty": (np.zeros((0, 3)), "a.npy must have a point; it is empty"),
    "nan": (np.array([[0, 0, 0], [0, np.nan, 1]]), r"a.npy, row 1: coordinates must be finite"),
    "columns": (np.zeros((4, 2)), r"a.npy is damaged.* must be \[n, 3\] or wider; got \(4, 2\)"),
    "text": (np.array([["a"] * 3]), "a.npy is damaged.* must hold numbers"),
    "negative": (np.array([[0, 0, 0], [3, -1, 0]]), r"a.npy, row 1: \[3, -1, 0\] is negative"),
    "beyond": (np.array([[0, 0, 32]]), r"a.npy, row 0: \[0, 0, 32\] is beyond the grid"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_costs_one_line_that_names_it_and_the_row(what: str, tmp_path: Path) -> None:
    array, message = BAD[what]
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as caught:
        points = read_points(tmp_path / "a.npy", labelled=False)
        voxelise(tmp_path / "a.npy", points, (32, 32, 32), voxel_size=0.1)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_ply(tmp_path / "a.ply", [(1, 2, 3, 0, 1)], count=2)
    (tmp_path / "b.ply").write_text("hello")
    (tmp_path / "c.bin").write_bytes(b"\0" * 17)
    for name, message in (
        ("a.ply", "must have 2 numbers x; got 1"),
        ("b.ply", ""),
        ("c.bin", "16"),
    ):
        with pytest.raises(ValueError, match=re.escape(name) + ".*" + message):
            read_points(tmp_path / name, labelled=True)


def folders(directory: Path, per_voxel: bool) -> None:
    """Six files to a split: of two kinds, of 5 to 10 points."""
    random = np.random.default_rng(3)
    for split in ("train", "validation", "test"):
        for number in range(6):
            name = ("chair", "lamp")[number % 2]
            folder = directory / split / ("" if per_voxel else name)
            folder.mkdir(parents=True, exist_ok=True)
            cells = random.permutation(64)[: 5 + number]
            np.save(folder / f"{number}.npy", np.stack(np.unravel_index(cells, (4, 4, 4)), axis=1))
            if per_voxel:
                np.array(cells % 3 + 10, np.uint32).tofile(folder / f"{number}.label")


def test_rows_of_files_have_as_many_clouds_as_fit(tmp_path: Path) -> None:
    folders(tmp_path, per_voxel=True)
    options: dict[str, Any] = {"grid": (4, 4, 4), "voxels": 20, "clouds": 2, "ignored": (11,)}
    task = make(data_dir=str(tmp_path), **options)
    examples: Any = task.train(0)
    # 5 + 6 | 7 + 8 | 9 | 10: two at most, of 20 voxels at most.
    assert examples.length == 3 and task.sizes["classes"] == 2
    batch = examples.fetch(np.arange(3))
    assert batch["mask"].sum(axis=1).tolist() == [11, 15, 19]
    cells = np.ravel_multi_index(tuple(np.moveaxis(batch["coordinates"], -1, 0)), (4, 4, 4))
    np.testing.assert_array_equal(batch["weights"], batch["mask"] & (cells % 3 != 1))
    counted = batch["weights"] > 0
    np.testing.assert_array_equal(batch["labels"][counted], (cells % 3 == 2)[counted])
    with pytest.raises(ValueError, match=r"5.npy has 10 voxels, more than .*task.voxels=9"):
        make(data_dir=str(tmp_path), **options | {"voxels": 9})
    (tmp_path / "test/0.label").unlink()
    with pytest.raises(ValueError, match=r"0.npy has no label, and there is no .*0.label"):
        make(data_dir=str(tmp_path), **options)


def test_clouds_of_folders_have_the_class_of_their_folder(tmp_path: Path) -> None:
    folders(tmp_path, per_voxel=False)
    task: Any = make(data_dir=str(tmp_path), labels="cloud", grid=(4, 4, 4), voxels=64, clouds=4)
    assert task.provenance["classes"] == ["chair", "lamp"]
    batch = task.evaluations["test"].fetch(np.arange(2))
    assert batch["labels"].tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    (tmp_path / "test/bed").mkdir()
    np.save(tmp_path / "test/bed/1.npy", np.zeros((1, 3), int))
    with pytest.raises(ValueError, match=r"1.npy has the label 'bed', which no file of train has"):
        make(data_dir=str(tmp_path), labels="cloud", grid=(4, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "point"}, "task.labels must be one of 'voxel', 'cloud'; got 'point'"),
        ({"radius": (5.0, 4.0)}, "task.radius must be"),
        ({"radius": (5.0, 9.0)}, r"at most half of the least extent .* got \(5.0, 9.0\)"),
        ({"voxels": 7}, "task.voxels must be at least two for each of task.clouds=4; got 7"),
        ({"origin": (0.0,)}, "task.origin must be"),
        (
            {"data_dir": "/nowhere"},
            "task.data_dir must have folders .* /nowhere/train is not there",
        ),
    ],
)
def test_options_that_mean_nothing_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
