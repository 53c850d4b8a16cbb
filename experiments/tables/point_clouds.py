"""LION's parts one by one, on generated shapes among clutter: operators, sizes of groups, orders,
descriptors and generated voxels.

Liu et al., "LION: Linear Group RNN for 3D Object Detection in Point Clouds", NeurIPS 2024. The
paper detects objects in scans of roads, which is not done here: what it says of operators is an
order, not a number to stand beside ours (Waymo, level 2, mAP: Mamba 75.1, RetNet 74.6)."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Classes of voxels, by the parts of LION"
METRIC = "Of the voxels of test clouds"
SIZES = True
SCALES = {
    "cpu": (
        "two seeds, the recipe's smoke size: one block of width 32 and a last layer, grids of 16 x"
        " 16 x 16 with one or two shapes, 16 clouds a step, 400 steps."
    )
}
RETNET: dict[str, Any] = {
    "model.mixers.lion.operator": "retnet",
    "model.mixers.lion.state_size": 16,
    "model.branch_norm": False,
    "model.mlp": "gelu",
}
# row -> overrides. The operator is Mamba in groups of 128 and, in the last layer, 64.
ROWS: dict[str, dict[str, Any]] = {
    "Mamba": {},
    "RetNet": RETNET,
    "GLA": {},  # of its own config, with pre-norms and an MLP
    "groups of 32 and 16": {"model.groups": (32, 16)},
    "the whole cloud": {"model.groups": (1024, 1024)},
    "last groups filled up": {"model.fill_groups": True},
    "along x alone": {"model.orders": ("x",)},
    "in random order": {"model.orders": ("random", "random")},
    "no operator": {"model.orders": ()},
    "no shifted windows": {"model.shifted_windows": False},
    "no descriptor": {"model.descriptor": False},
    "no generated voxels": {"model.generated": 0.0},
}
COLUMNS = {"mean IoU": "test/mean_iou", "accuracy": "test/accuracy"}


def cells(scale: str) -> list[Cell]:
    del scale
    longer = {
        "steps": 400,
        "optimizer.warmup_steps": 40,
        "eval.every_steps": 200,
        "checkpoint.every_steps": 200,
        "log_every_steps": 50,
    }
    return [
        Cell(
            row,
            column,
            f"{'gla' if row == 'GLA' else 'lion'}:shape_segmentation,smoke",
            metric,
            overrides=longer | overrides,
            seeds=(0, 1),
        )
        for row, overrides in ROWS.items()
        for column, metric in COLUMNS.items()
    ]


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """What the paper says of operators."""
    of_row = {cell.row: cell for cell in cells if cell.column == "mean IoU"}
    return [(of_row["Mamba"], of_row["RetNet"])]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """A bar of the mean IoU for each row; whiskers span the seeds."""
    names = list(ROWS)
    for cell, found in results:
        if cell.column != "mean IoU":
            continue
        values = found["evaluations"]["test"]["mean_iou"]
        mean = sum(values) / len(values)
        spread = [[mean - min(values)], [max(values) - mean]]
        axes.barh(names.index(cell.row), mean, xerr=spread, color="C0")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("mean IoU")
    axes.invert_yaxis()
