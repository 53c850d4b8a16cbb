"""Attention, state-space models and gated recurrences are one linear time-varying system: how far
its forms are from each other, and from our layers.

Sieber, Amo Alonso, Didier, Zeilinger, Orvieto, "Understanding the Differences in Foundation Models:
Attention, State Space Models, and Recurrent Neural Networks", NeurIPS 2024, arXiv 2405.15731.
Nothing is trained: experiments/tables/computations/linear_systems.py computes every number."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Layers as linear time-varying systems"
SOURCE = (
    "the paper (arXiv 2405.15731) proves that the forms are equal, and that softmax attention is"
    " the limit of systems with more and more states per channel; it has no such numbers"
)
METRIC = (
    "Decimal logarithm of the largest difference to the system's walk through time in float64, over"
    " the largest number of the same array; of gradients the worst of x and all parameters. matrix:"
    " the system as one matrix, equations: those of the layer's own paper, both in float64; layer:"
    " ours, in float32, whose rounding is -7.2. softmax: the values of softmax attention"
)
SCALES = {
    "cpu": (
        "complete, three minutes: layers of width 8 with random parameters, sequences of 12 tokens,"
        " three seeds. No difference is told apart from one below float64's rounding, -16.0. Taylor"
        " features of softmax attention are those of keys of size 2 and logits of order one."
    )
}
LAYERS = {
    "Softmax attention, the cache as state": "softmax",
    "Linear attention": "linear",
    "Normalised attention": "normalised",
    "S6 (Mamba)": "s6",
    "SSD (Mamba-2)": "ssd",
    "qLSTM": "qlstm",
    "qLSTM, reversed": "qlstm_reversed",
}
FORMS = {"matrix": "quadratic", "equations": "equations", "layer": "layer"}
DEGREES = {1: 3, 2: 6, 3: 10, 5: 21, 8: 45}  # and how many features, C(degree + 2, 2)


def cells(scale: str) -> list[Cell]:
    seeds = (0, 1, 2)
    found: list[Cell] = [
        Computation(
            row,
            f"{column}, {what}",
            "linear_systems:measure",
            f"{form}/{what}_log10",
            overrides={"layer": layer},
            seeds=seeds,
        )
        for row, layer in LAYERS.items()
        for column, form in FORMS.items()
        for what in ("values", "gradients")
    ]
    for degree, features in DEGREES.items():
        found.append(
            Computation(
                f"Taylor features of degree {degree}, {features} of them",
                "softmax",
                "linear_systems:taylor",
                "softmax/values_log10",
                overrides={"degree": degree},
                seeds=seeds,
            )
        )
    return found


def orderings(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """More features are nearer to softmax attention."""
    of_degrees = [cell for cell in cells if cell.column == "softmax"]
    return list(itertools.pairwise(of_degrees))


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Distance to softmax attention against the features of a head, a point for each seed."""
    for cell, row in results:
        if cell.column == "softmax":
            values = row["evaluations"]["softmax"]["values_log10"]
            features = DEGREES[cell.overrides["degree"]]
            axes.plot([features] * len(values), [10**value for value in values], "o", color="C0")
    axes.set(
        xlabel="features of a key of size 2",
        ylabel="distance to softmax attention",
        xscale="log",
        yscale="log",
    )
