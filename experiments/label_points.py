"""Labels of a point cloud in a file, by a trained run of point_clouds.

    python -m experiments.label_points --workdir=runs/lion --cloud=scan.ply

Of a run with classes of voxels, beside the file or in the folder --out: scan.label, uint32 for each
point, the label as training's files have it or, of generated shapes, the number of the class; and
scan.labelled.ply, the points in a colour for each class. A point outside of the grid, where the run
leaves those out (task.crop), has the label 65535 and is grey. Of a run with classes of clouds, what
is printed is the class."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import trimesh
from absl import flags
from flax import nnx
from matplotlib import colormaps

from experiments.tasks.point_clouds import Row
from experiments.tasks.sources.point_files import Cloud, read_points, voxelise
from experiments.training import command_line
from experiments.training.run_loading import LoadedRun, load_run

NAME = "point_clouds"
LEFT_OUT = 65_535
GREY = (128, 128, 128, 255)


@dataclass(frozen=True)
class Labelled:
    """places [n, 3] of the points; classes [n] of each, -1 where it was left out, or the one of the
    cloud, [1]; share [n] or [1], the probability that the model gives; voxels, their number."""

    places: np.ndarray
    classes: np.ndarray
    share: np.ndarray
    voxels: int


def voxels_of(run: LoadedRun, path: Path, voxel_size: float | None) -> tuple[np.ndarray, Cloud]:
    """The points of a file and their voxels, cut as the run's own are. Raises ValueError for a run
    of another task, and a file with other features than the run's."""
    task = run.config.task
    if task.name != NAME:
        raise ValueError(f"--workdir must hold a run of {NAME}; it has learned {task.name}")
    points = read_points(path, labelled=False)
    size = voxel_size or (task.voxel_size if task.data_dir else 1.0)  # shapes are made of cells
    options: dict[str, Any] = {"voxel_size": size, "origin": task.origin, "crop": task.crop}
    cloud = voxelise(path, points, tuple(task.grid), **options)
    channels, found = run.task.sizes["channels"], cloud.features.shape[1]
    if found != channels:
        raise ValueError(
            f"{path} must have {channels - 4} features of a point beside x, y and z, as the run's"
            f" clouds have; got {found - 4}"
        )
    return points.places, cloud


def label(run: LoadedRun, path: Path, voxel_size: float | None, replica: int = 0) -> Labelled:
    """What a replica of the run makes of the points of a file."""
    places, cloud = voxels_of(run, path, voxel_size)
    sizes = run.task.sizes
    length = max(run.config.task.voxels, len(cloud.places))
    row = Row(length, sizes["clouds"], bool(sizes["per_voxel"]), sizes["channels"])
    batch = {name: array[None] for name, array in row.pack([cloud], [0]).items()}
    model: Any = nnx.merge(run.blueprint.graphdef, *run.replica(replica))
    model.eval()
    inputs = {name: batch[name] for name in ("coordinates", "segment_ids", "mask")}

    @jax.jit
    def probabilities(model: Any, voxels: Any, inputs: Any) -> jax.Array:
        return jax.nn.softmax(model(voxels, **inputs)[0])

    found = np.asarray(probabilities(model, batch["voxels"], inputs))
    found = found[: len(cloud.places)] if row.per_voxel else found[:1]
    classes, share = found.argmax(axis=1), found.max(axis=1)
    if row.per_voxel:
        there = cloud.voxel_of >= 0
        classes = np.where(there, classes[cloud.voxel_of], -1)
        share = np.where(there, share[cloud.voxel_of], 0.0)
    return Labelled(places, classes, share, len(cloud.places))


def write(found: Labelled, names: list[str], folder: Path, stem: str) -> tuple[Path, Path]:
    """The files of labels and of coloured points."""
    numbers = [int(name) if name.isdecimal() else number for number, name in enumerate(names)]
    of_class = np.array([*numbers, LEFT_OUT], np.uint32)  # -1 is the last
    palette = (255 * colormaps["tab20"](np.arange(len(names)) % 20)).astype(np.uint8)
    colours = np.concatenate([palette, np.array([GREY], np.uint8)])
    folder.mkdir(parents=True, exist_ok=True)
    labels, coloured = folder / f"{stem}.label", folder / f"{stem}.labelled.ply"
    of_class[found.classes].tofile(labels)
    trimesh.PointCloud(found.places, colors=colours[found.classes]).export(coloured)
    return labels, coloured


def main() -> None:
    options = flags.FLAGS
    path = Path(options.cloud).expanduser()
    run = load_run(Path(options.workdir), options.step, reads_data=False)
    if not 0 <= options.replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {options.replica}")
    began = time.monotonic()
    found = label(run, path, options.voxel_size, options.replica)
    seconds = time.monotonic() - began
    names = list(run.task.provenance["classes"])
    what = f"{len(found.places)} points, {found.voxels} voxels, {seconds:.1f} s with compilation"
    if not run.task.sizes["per_voxel"]:
        print(f"{path}: {names[found.classes[0]]} ({found.share[0]:.2f}); {what}")
        return
    folder = Path(options.out).expanduser() if options.out else path.parent
    labels, coloured = write(found, names, folder, path.stem)
    print(f"{labels} and {coloured.name}: {what}")
    for number, name in enumerate(names):
        if count := int(np.sum(found.classes == number)):
            print(f"{count:>9} points  {name}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_string("cloud", None, "A .ply, .npy or .bin file.", required=True)
    flags.DEFINE_string("step", "best", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_float("voxel_size", None, "Of a voxel, in units of the file; the run's own.", 1e-9)
    flags.DEFINE_integer("replica", 0, "Which of config.seeds, counted from 0.")
    flags.DEFINE_string("out", "", "Folder of what is written; that of the file if it is left out.")
    command_line.run(main)
