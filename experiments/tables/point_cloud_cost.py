"""What a network of point clouds costs by the number of voxels: operators in groups, which cost in
proportion to them, beside softmax attention over the whole cloud.

Liu et al., "LION: Linear Group RNN for 3D Object Detection in Point Clouds", NeurIPS 2024.

    python -m experiments.reproduce --table=point_cloud_cost --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Cost of a point cloud by the number of its voxels"
METRIC = (
    "Milliseconds of the logits of all voxels of one cloud, one block of width 32 and a last layer,"
    " float32; the fastest of 3 rounds. In the columns of memory, MiB for what is computed on the"
    " way"
)
SCALES = {"cpu": "complete. Plain JAX; groups of 1,024."}
# row -> operator of computations/point_cloud_cost, and the voxels of a group, 0 for the whole cloud
ROWS = {
    "Mamba": ("mamba", 1_024),
    "RetNet": ("retnet", 1_024),
    "GLA": ("gla", 1_024),
    "RetNet, the whole cloud": ("retnet", 0),
    "softmax, the whole cloud": ("softmax", 0),
    "no operator": ("none", 1_024),
}
VOXELS = (1_024, 4_096, 16_384, 49_152)
LARGEST_SOFTMAX = 4_096


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            f"{voxels:,} voxels{'' if metric == 'ms' else ', MiB'}",
            "point_cloud_cost:by_voxels",
            f"cloud/{metric}",
            overrides={"operator": operator, "voxels": voxels, "group": group},
            gap="takes minutes and gigabytes"
            if operator == "softmax" and voxels > LARGEST_SOFTMAX
            else "",
        )
        for row, (operator, group) in ROWS.items()
        for metric in ("ms", "mib")
        for voxels in (VOXELS if metric == "ms" else (VOXELS[0], VOXELS[-1]))
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds against voxels, a line for each row, and what is proportional."""
    for row in ROWS:
        points = {
            cell.overrides["voxels"]: found["evaluations"]["cloud"]["ms"][0]
            for cell, found in results
            if cell.row == row and cell.metric == "cloud/ms"
        }
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=row)
    low, high = axes.get_ylim()
    proportional = [low * n / VOXELS[0] for n in VOXELS]
    axes.plot(VOXELS, proportional, "--", color="0.7", label="~ voxels")
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel="voxels", ylabel="ms a cloud")
    axes.legend(fontsize=7)
