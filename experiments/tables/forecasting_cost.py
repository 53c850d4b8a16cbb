"""What a forecast costs by the number of variates: a recurrence over variates beside attention.

Wang et al., "Is Mamba Effective for Time Series Forecasting?", Neurocomputing 2025, arXiv
2403.11144, whose claim is a cost that grows in proportion to the variates.

    python -m experiments.reproduce --table=forecasting_cost --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Cost of a forecast by the number of variates"
METRIC = (
    "Milliseconds of the gradient of one window, two layers of width 128, 96 rows read and"
    " forecast; the fastest of 5 rounds"
)
SCALES = {"cpu": "complete. float32, plain JAX."}
# row -> encoder of forecaster_timing
ENCODERS = {
    "S-Mamba": "s_mamba",
    "S-Mamba, one direction": "s_mamba, one direction",
    "iTransformer": "itransformer",
}
VARIATES = (128, 256, 512, 1024, 2048)


def cells(scale: str) -> list[Cell]:
    del scale
    return [
        Computation(
            row,
            f"{variates} variates",
            "forecaster_timing:measure",
            "step/ms",
            overrides={"encoder": encoder, "variates": variates},
        )
        for row, encoder in ENCODERS.items()
        for variates in VARIATES
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds against variates, a line for each encoder, and what is proportional."""
    for row in ENCODERS:
        points = [
            (cell.overrides["variates"], found["evaluations"]["step"]["ms"][0])
            for cell, found in results
            if cell.row == row
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=row)
    low, high = axes.get_ylim()
    axes.plot(VARIATES, [low * n / VARIATES[0] for n in VARIATES], "--", color="0.7", label="~ V")
    axes.set(
        xscale="log", yscale="log", ylim=(low, high), xlabel="variates V", ylabel="ms a window"
    )
    axes.legend(fontsize=8)
