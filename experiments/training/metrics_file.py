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
    """The rows so far; a last line that was cut off in writing is left out."""
    file = workdir / FILE
    rows = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def mean(values: Sequence[float | None]) -> float:
    """The mean over seeds; NaN if one of them has no finite value."""
    return math.nan if None in values else float(np.mean(np.asarray(values, np.float64)))
