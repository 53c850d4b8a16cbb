"""metrics.jsonl of a run, read; without jax, so that pages and figures can be made anywhere.

One line is one step: {"step": 200, "train/loss": [2.31, 2.29], ..., "validation/accuracy": [...]},
with one number per seed in every list, null where it is not finite. "train/" numbers are means over
the steps since the line before; other names are "<evaluation>/<metric>". Names under "speed/" are
scalars and depend on the machine; all others are functions of config and seed."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE = "metrics.jsonl"
Row = Mapping[str, Any]


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows so far, without lines that are none, such as a last one that was cut off in
    writing."""
    return rows_and_others(workdir)[0]


def rows_and_others(workdir: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows of metrics.jsonl, and the lines that are no rows."""
    file = workdir / FILE
    rows, others = [], []
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif line:
            others.append(line)
    return rows, others


def mean(values: Sequence[float | None]) -> float:
    """The mean over seeds; NaN if one of them has no finite value."""
    return math.nan if None in values else float(np.mean(np.asarray(values, np.float64)))
