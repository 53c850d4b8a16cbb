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
    names = {name for row in rows for name in row if name.endswith("/loss")} - {"train/loss"}
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
