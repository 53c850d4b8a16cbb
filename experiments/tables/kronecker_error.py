"""Kronecker attention in linear time: the error of the polynomial against its degree and the bound
of the entries.

Alman and Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to
Kronecker Computation", ICLR 2024, arXiv 2310.04064. Nothing is trained:
experiments/tables/computations/kronecker_numerics.py computes every number."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Kronecker attention by a polynomial"
SOURCE = (
    "the paper (arXiv 2310.04064) has theorems and no numbers: the error vanishes in almost linear"
    " time for entries below (log n)^(1/3), and no faster algorithm than cubic exists above"
)
METRIC = (
    "Decimal logarithm of the largest error of an output, values being below one; entries of"
    " queries and keys are uniform between the bounds -B and B"
)
SCALES = {
    "cpu": "complete, seconds: 64 tokens, keys of size 3, three draws, float64, no causal order."
}
RIVALS = "column"
DEGREES = (1, 2, 4, 6)
BOUNDS = (0.4, 0.8, 1.6, 3.2)


def cells(scale: str) -> list[Cell]:
    return [
        Computation(
            f"degree {degree}",
            f"B = {bound}",
            "kronecker_numerics:measure",
            "polynomial/error_log10",
            overrides={"bound": bound, "degree": degree},
            seeds=(0, 1, 2),
        )
        for degree in DEGREES
        for bound in BOUNDS
    ]


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Larger bounds and smaller degrees have larger errors; above B = 1 not every degree more
    helps."""
    of = {(cell.overrides["degree"], cell.overrides["bound"]): cell for cell in cells}
    wider = [(of[g, b], of[g, a]) for g in DEGREES for a, b in itertools.pairwise(BOUNDS)]
    lower = [(of[g, b], of[h, b]) for b in BOUNDS[:2] for g, h in itertools.pairwise(DEGREES)]
    return wider + lower


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Error against the bound, a line for each degree."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell, row in results:
        values = row["evaluations"]["polynomial"]["error_log10"]
        point = cell.overrides["bound"], 10 ** (sum(values) / len(values))
        lines.setdefault(cell.row, []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="bound of entries", ylabel="largest error", xscale="log", yscale="log")
    if axes.lines:
        axes.legend(fontsize=8)
