"""Labels of a file: of each point, written and in colours, or of the cloud."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from experiments import label_points, train
from experiments.configs.lion import get_config
from experiments.training.run_loading import LoadedRun, load_run

CELLS = np.array([[0, 0, 0], [3, 2, 1], [3, 2, 1], [7, 7, 7]], np.float64) + 0.25


def run_of(labels: str, folder: Path) -> LoadedRun:
    """One step of a network without operators: what is tested here does not depend on them."""
    config: Any = get_config(f"shape_{labels},smoke")
    config.task.update({"grid": (8, 8, 8), "radius": (2.0, 3.0), "voxels": 64, "test_examples": 2})
    config.model.update({"width": 8, "orders": (), "descriptor": False, "generated": 0.0})
    config.update({"steps": 1, "batch_size": 2})
    config.optimizer.warmup_steps = 0
    train.run(config, folder / labels, quiet=True)
    return load_run(folder / labels, "latest", reads_data=False)


@pytest.mark.slow
def test_each_point_has_the_label_of_its_voxel_and_a_colour(tmp_path: Path) -> None:
    run = run_of("segmentation", tmp_path)
    np.save(tmp_path / "scan.npy", CELLS)
    found = label_points.label(run, tmp_path / "scan.npy", None)
    assert found.voxels == 3 and found.classes[1] == found.classes[2]
    assert (found.share > 1 / 9).all() and (found.share < 1).all()
    # Twice the size, twice the voxel: other means of places, but the same cells.
    np.save(tmp_path / "large.npy", 2 * CELLS)
    again = label_points.label(run, tmp_path / "large.npy", 2.0)
    np.testing.assert_array_equal(again.classes, found.classes)

    names = [str(name) for name in run.task.provenance["classes"]]
    left_out = label_points.Labelled(CELLS, np.array([2, 0, 8, -1]), found.share, 3)
    labels, coloured = label_points.write(left_out, names, tmp_path / "out", "scan")
    assert np.fromfile(labels, np.uint32).tolist() == [2, 0, 8, 65_535]
    cloud: Any = trimesh.load(coloured)
    np.testing.assert_allclose(cloud.vertices, CELLS)
    assert cloud.colors[3].tolist() == list(label_points.GREY)
    assert len(np.unique(cloud.colors, axis=0)) == 4
    labels, _ = label_points.write(left_out, [f"1{n}" for n in range(9)], tmp_path, "other")
    assert np.fromfile(labels, np.uint32).tolist() == [12, 10, 18, 65_535]

    np.save(tmp_path / "wide.npy", np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"wide.npy must have 0 features .*; got 1"):
        label_points.label(run, tmp_path / "wide.npy", None)


@pytest.mark.full
def test_a_cloud_has_one_label(tmp_path: Path) -> None:
    run = run_of("classification", tmp_path)
    np.save(tmp_path / "scan.npy", CELLS)
    found = label_points.label(run, tmp_path / "scan.npy", None)
    assert found.classes.shape == found.share.shape == (1,)
