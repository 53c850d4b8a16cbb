"""Forecasts of several variates: encoders of variates beside a linear map and a recurrence over
time.

Wang et al., "Is Mamba Effective for Time Series Forecasting?", Neurocomputing 2025, arXiv
2403.11144 (S-Mamba); Liu et al., "iTransformer", ICLR 2024, arXiv 2310.06625; Zeng et al., "Are
Transformers Effective for Time Series Forecasting?", AAAI 2023, arXiv 2205.13504 (DLinear)."""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell

TITLE = "Multivariate forecasting"
SOURCE = "each paper's own table, 96 rows ahead, quoted without the paper at hand"
METRIC = "Error of the test windows, of values standardised by the training rows; 96 rows are read"
SCALES = {
    "cpu": (
        "two seeds trained together, with the papers' settings in full, ten epochs, the one with"
        " the best validation MSE. Papers stop early and report one seed or the mean of a few; some"
        " leave out the last windows of the test, which are all counted here. Sets: download them"
        " into ~/forecasting as the README says."
    )
}

SETS = {"ETTh1": "etth1", "ETTh2": "etth2", "exchange": "exchange"}
HORIZONS = (96, 192, 336, 720)
ONE_WAY = {"model.mixers.s_mamba.bidirectional": False}
DLINEAR = {"model.decomposition": True, "model.instance_norm": False}
# column -> config file and overrides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "S-Mamba": ("s_mamba", {}),
    "iTransformer": ("itransformer", {}),
    "DLinear": ("linear_forecaster", DLINEAR),
    "linear, instance norm": ("linear_forecaster", {}),
    "GLA over time": ("gla", {}),
    "S-Mamba, one direction": ("s_mamba", ONE_WAY),
}
LAST = "last row repeated"
MSE, MAE = "MSE", "MAE"

# model -> set -> MSE and MAE 96 rows ahead. What is published of longer horizons and of DLinear has
# not been checked against a source, and is a gap.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "S-Mamba": {"ETTh1": (0.386, 0.405), "ETTh2": (0.296, 0.348), "exchange": (0.086, 0.207)},
    "iTransformer": {"ETTh1": (0.386, 0.405), "ETTh2": (0.297, 0.349), "exchange": (0.086, 0.206)},
}


RIVALS = "column"


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        cell
        for horizon in HORIZONS  # the shortest of all sets first
        for dataset in SETS
        for metric in (MSE, MAE)
        for cell in _row(dataset, horizon, metric)
    ]


def _row(dataset: str, horizon: int, metric: str) -> list[Cell]:
    row, recipe = f"{dataset}, {horizon}, {metric}", f"{SETS[dataset]}_{horizon}"
    found = []
    for column, (config, overrides) in MODELS.items():
        published = PUBLISHED.get(column, {}).get(dataset) if horizon == 96 else None
        found.append(
            Cell(
                row,
                column,
                f"{config}:{recipe}",
                f"test/{metric.lower()}",
                overrides=overrides,
                seeds=(0, 1),
                published=published[metric == MAE] if published else None,
            )
        )
    # Of the run that is cheapest; it is the same for all.
    config, overrides = MODELS["linear, instance norm"]
    last = {"overrides": overrides, "seeds": (0, 1)}
    found.append(Cell(row, LAST, f"{config}:{recipe}", f"test/last_{metric.lower()}", **last))
    return found


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """MSE at a horizon of 96 over the published one of iTransformer, one dot per seed."""
    columns = (*MODELS, LAST)
    for dataset, marker in zip(SETS, "osd", strict=True):
        unit = PUBLISHED["iTransformer"][dataset][0]
        points = [
            (value / unit, columns.index(cell.column))
            for cell, row in results
            if cell.row == f"{dataset}, 96, {MSE}"
            for value in row["evaluations"]["test"][cell.metric.partition("/")[2]]
        ]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], marker, label=dataset)
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set(
        yticks=range(len(columns)),
        yticklabels=columns,
        xscale="log",
        xlabel="MSE, 96 rows ahead, over iTransformer's published one",
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8)
