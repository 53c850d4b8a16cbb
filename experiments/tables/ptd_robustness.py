"""Perturb then diagonalise: what replaces HiPPO-LegS in a diagonal model, and what a tone in the
input does to it.

Yu, Nigmetov, Morozov, Mahoney, Erichson, "Robustifying State-space Models for Long Sequences via
Approximate Diagonalization", ICLR 2024, arXiv 2310.01698. Nothing is trained:
experiments/tables/computations/ptd_numerics.py computes every number from the initial systems of
models/s4, models/s4d.py and models/parts/hippo.py."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Approximate diagonalisations of HiPPO-LegS"
SOURCE = (
    "the paper (arXiv 2310.01698) has such numbers in figures only; its theorem puts the"
    " gap of S4D at a constant for all N, here 200 / pi per cent, and that of a perturbation at"
    " the order of its size"
)
METRIC = (
    "cond: decimal logarithm of the condition of the eigenvectors (above 16: more than float64 can"
    " tell). change: spectral norm of the change of the state matrix, per cent of its own. gap:"
    " largest difference of the states' frequency responses for a unit input vector, per cent."
    " rightmost: largest real part of an eigenvalue. The other columns: decimal logarithm of the"
    " normalised squared error of a linear read-out at N = 16 that delays a smooth signal, without"
    " and with a tone of a tenth of the signal's strength at the last resonance of S4D, and both"
    " with the read-out that was fitted on S4"
)
SCALES = {
    "cpu": (
        "complete, half a minute. A Gaussian E is drawn four times, as are the signals"
        " to delay. Read-outs are least squares with a ridge of 1e-6 of the states'"
        " energy, so their errors measure that choice too."
    )
}
# gamma: the weight of the perturbation's size against the condition.
SYSTEMS: dict[str, dict[str, Any]] = {
    "S4, exact": {"name": "s4"},
    "S4D, normal part": {"name": "s4d"},
    "PTD, gamma = 1": {"name": "ptd", "gamma": 1.0},
    "PTD, gamma = 10": {"name": "ptd", "gamma": 10.0},
    "PTD, gamma = 100": {"name": "ptd", "gamma": 100.0},
    "Gaussian E, 1 %": {"name": "random", "relative": 1e-2},
    "Gaussian E, 0.1 %": {"name": "random", "relative": 1e-3},
}
COLUMNS = {
    "cond": "matrix/condition_log10",
    "change": "matrix/distance_percent",
    "gap": "response/gap_percent",
    "rightmost": "matrix/rightmost",
}
DELAY_COLUMNS = {
    "delay": "clean/error_log10",
    "delay, tone": "spike/error_log10",
    "S4's read-out": "borrowed_clean/error_log10",
    "S4's read-out, tone": "borrowed_spike/error_log10",
}


def cells(scale: str) -> list[Cell]:
    draws = (0, 1, 2, 3)
    result: list[Cell] = []
    for row, arguments in SYSTEMS.items():
        for size in (16, 64):
            result += [
                Computation(
                    row,
                    f"N = {size}: {column}",
                    "ptd_numerics:measure",
                    metric,
                    overrides={**arguments, "size": size},
                    seeds=draws if arguments["name"] == "random" else (0,),
                )
                for column, metric in COLUMNS.items()
            ]
        result += [
            Computation(
                row,
                column,
                "ptd_numerics:delay_under_tones",
                metric,
                overrides={**arguments, "size": 16},
                seeds=draws,
            )
            for column, metric in DELAY_COLUMNS.items()
        ]
    return result


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Error of the delay against the frequency of the tone, mean over the draws."""
    for cell, row in results:
        if cell.column != "delay, tone":
            continue
        points = sorted(
            (float(label.removeprefix("tone_")), metrics["error_log10"])
            for label, metrics in row["evaluations"].items()
            if label.startswith("tone_")
        )
        axes.plot(
            [omega for omega, _ in points],
            [10 ** (sum(values) / len(values)) for _, values in points],
            label=cell.row,
        )
    axes.set(
        xlabel="frequency of the tone",
        ylabel="normalised squared error of the delay",
        xscale="log",
        yscale="log",
    )
    if axes.lines:
        axes.legend(fontsize=8)
