"""What it costs to separate a sound by its length.

MossFormer2 (Zhao et al., ICASSP 2024, arXiv 2312.11825) claims a cost in proportion to it.

    python -m experiments.reproduce --table=separation_cost --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Cost of separation by the length of a sound"
METRIC = (
    "Milliseconds of the gradient of one mixture at 8 kHz, two blocks of width 64; the fastest of 5"
    " rounds"
)
SCALES = {"cpu": "complete. float32, plain JAX."}
# row -> separator of separator_timing
SEPARATORS = {"MossFormer": "none", "MossFormer2": "dense", "softmax attention": "vit"}
SECONDS = (1, 2, 4, 8, 16)
LONGEST = {"softmax attention": 4}  # of all pairs of tokens, further ones take gigabytes


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            f"{seconds} s",
            "separator_timing:measure",
            "step/ms",
            overrides={"separator": separator, "seconds": float(seconds)},
        )
        for row, separator in SEPARATORS.items()
        for seconds in SECONDS
        if seconds <= LONGEST.get(row, max(SECONDS))
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds against seconds of sound, a line for each separator, and what is
    proportional."""
    for row in SEPARATORS:
        points = [
            (cell.overrides["seconds"], found["evaluations"]["step"]["ms"][0])
            for cell, found in results
            if cell.row == row
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=row)
    low, high = axes.get_ylim()
    axes.plot(SECONDS, [low * n / SECONDS[0] for n in SECONDS], "--", color="0.7", label="~ T")
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlabel="seconds of sound", ylabel="ms")
    axes.legend(fontsize=8)
