"""Figures of recorded numbers: a table's own, and the losses of one run."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from experiments.reporting.rows import is_finite
from experiments.reporting.table import Cell
from experiments.training.metrics_file import mean, read_rows


def draw_table(table: ModuleType, cells: Sequence[Cell], rows: Sequence[Any], path: Path) -> None:
    """Draws the figure of a table into the file `path`. Without rows, or a `draw` of the table,
    there is none."""
    results = [
        (cell, row) for cell, row in zip(cells, rows, strict=True) if row and is_finite(cell, row)
    ]
    if not results or not hasattr(table, "draw"):
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    table.draw(figure.subplots(), results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def draw_losses(workdir: Path, seeds: Sequence[int]) -> Path:
    """loss.png of a run: training loss per seed, and the mean over seeds of every evaluation's
    loss."""
    rows = read_rows(workdir)
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    train = [row for row in rows if "train/loss" in row]
    for place, seed in enumerate(seeds):
        losses = [mean([row["train/loss"][place]]) for row in train]
        axes.plot([row["step"] for row in train], losses, linewidth=1, label=f"train, seed {seed}")
    errors = ("/loss", "/mse")  # of tokens and of forecasts
    names = {name for row in rows for name in row if name.endswith(errors)} - {"train/loss"}
    for name in sorted(names):
        evaluated = [row for row in rows if name in row]
        steps, losses = zip(*((row["step"], mean(row[name])) for row in evaluated), strict=True)
        axes.plot(steps, losses, "o--", markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(fontsize="small")
    path = workdir / "loss.png"
    figure.savefig(path, dpi=120)
    return path


# Variates in the figure of a forecast; of more, the first.
MOST_DRAWN = 4


def draw_forecast(forecast: Any, path: Path) -> None:
    """A `Forecast` of experiments/forecast.py, a panel for each variate: its history, the forecast
    and, where it is known, the truth."""
    names = forecast.names[:MOST_DRAWN]
    figure = Figure(figsize=(7, 1 + 1.6 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
        axes.plot(forecast.history_dates, forecast.history[:, place], color="0.5", label="history")
        if forecast.truth is not None:
            axes.plot(forecast.dates, forecast.truth[:, place], color="0.75", label="truth")
        axes.plot(forecast.dates, forecast.values[:, place], color="tab:red", label="forecast")
        axes.set_ylabel(name)
    panels[0].legend(fontsize=8, ncols=3, loc="upper left")
    figure.autofmt_xdate()
    figure.savefig(path, dpi=140)
