"""Twelve rows of the table `mqar`: one recurrence without decay, one with, the delta rule and
Mamba, at three widths.

    python -m launch.sweep --sweep=experiments/sweeps/mqar.py --scale=tiny --resources=parallel=2

The same file runs on every backend; one that is killed goes on from its last checkpoint.
"""

from dataclasses import replace

from experiments.reporting.table import Cell
from experiments.tables import mqar
from experiments.tables.mqar import METRIC, draw

__all__ = ["METRIC", "SCALES", "SIZES", "TITLE", "cells", "draw"]

TITLE = "Multi-query associative recall, twelve rows"
SIZES = True
SCALES = {"tiny": "as the table at scale cpu, but 60 steps: shows that it runs", **mqar.SCALES}
ROWS = ("Linear attention", "GLA", "DeltaNet", "Mamba")
TINY = {
    "steps": 60,
    "optimizer.warmup_steps": 6,
    "eval.every_steps": 60,
    "checkpoint.every_steps": 20,
}


def cells(scale: str) -> list[Cell]:
    tiny = scale == "tiny"
    of_table = [c for c in mqar.cells("cpu" if tiny else scale) if c.row in ROWS]
    if not tiny:
        return of_table
    return [replace(cell, overrides={**cell.overrides, **TINY}) for cell in of_table]
