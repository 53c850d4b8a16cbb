"""One page of a table or a sweep that opens in a browser from disk: numbers, provenance, learning
curves, lengths.

The page is made from rows, one's own beside those that are recorded, and from metrics.jsonl of the
workdirs that are at hand. It holds its data, script and style in itself and forbids itself every
network access. It can be filtered by row and by text, and shows curves of several columns over each
other; these choices stand in the address, so that a view can be passed on. page.html is its
template."""

import html
import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.reporting import rows
from experiments.reporting.markdown import format_cell, format_value
from experiments.reporting.table import Cell, Computation, config_hash, find_cells, find_workdir
from experiments.training.metrics_file import read_rows

TEMPLATE = Path(__file__).parent / "page.html"
LONGEST_CURVE = 300
NOT_CURVES = ("step", "train/rejected_steps", "train/longest_rejected_run")


def write(
    path: Path,
    table: Any,
    name: str,
    scale: str,
    own: Sequence[Mapping[str, Any]],
    *,
    runs: Path,
    recorded: Sequence[Mapping[str, Any]] = (),
    failed: Collection[str] = (),
) -> None:
    """Writes the report of a table (module) at a scale to `path`.

    own         rows as `read` of reporting/rows.py returns them
    recorded    likewise, those of the checkout: shown beside the own, and where there are none
    runs        folder of the workdirs; curves of those that are not there are left out
    failed      names of workdirs whose runs are known to have failed

    Raises ValueError for an unknown scale."""
    cells = find_cells(table, scale)
    published = any(cell.published is not None for cell in cells)
    found = rows.matching(cells, own, scale)
    beside = rows.matching(cells, recorded, scale)
    folder = runs / name / scale
    data = {
        "title": table.TITLE,
        "heading": f"{name} at scale {scale}: {table.SCALES[scale]}",
        "metric": table.METRIC,
        "source": f"; in brackets: {table.SOURCE}" if published else "",
        "cells": [
            _entry(cell, row, other, folder, failed)
            for cell, row, other in zip(cells, found, beside, strict=True)
        ],
    }
    # Inside <script>, "</script>" would end the data and "<!--" would change how it is read.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    parts = {"title": html.escape(table.TITLE), "data": text}
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], TEMPLATE.read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _entry(
    cell: Cell,
    row: Mapping[str, Any] | None,
    recorded: Mapping[str, Any] | None,
    folder: Path,
    failed: Collection[str],
) -> dict[str, Any]:
    """What the page says of a cell."""
    if cell.choice:  # the one that is chosen; without rows, the first of them
        chosen = row or recorded or {}
        hashes = {config_hash(variant.make_config()): variant for variant in cell.variants()}
        cell = hashes.get(chosen.get("config_hash", ""), cell.variants()[0])
    workdir = find_workdir(folder, cell)
    status, note = _status(cell, row, workdir, failed)
    if recorded and status == "not run":
        row, status, note = recorded, "recorded", f"at commit {rows.commit(recorded)}, not by you"
    entry: dict[str, Any] = {
        "row": cell.row,
        "column": cell.column,
        "config": cell.config,
        "overrides": {key: str(value) for key, value in cell.overrides.items()},
        "metric": cell.metric,
        "status": status,
        "note": note,
        "text": format_cell(cell if row else replace(cell, gap=status), row),
        "published": cell.published,
        "recorded": format_value(cell, recorded) if recorded else None,
        "curves": [] if isinstance(cell, Computation) else _curves(workdir),
        "lengths": list(_lengths(cell, row)) if row else [],
        "facts": {},
    }
    if row:
        entry["facts"] = {
            "per seed": [_rounded(value) for value in rows.value_of(cell, row)],
            "seeds": row["seeds"],
            "parameters": row["parameters"],
            "state bytes": row["state_bytes"],
            "sequences": row["examples"],
            "tokens": row.get("tokens") or "not recorded",
            "seconds": round(row["seconds"], 1),
            "rejected steps": row["rejected_steps"],
            "commit": rows.commit(row),
            "hardware": rows.machine(row),
            "versions": ", ".join(f"{k} {v}" for k, v in row["versions"].items()),
            "config hash": row["config_hash"],
        }
    return entry


def _status(cell: Cell, row: Any, workdir: Path, failed: Collection[str]) -> tuple[str, str]:
    """(status, why), for a cell without a row from what its run left behind."""
    if row:
        return "done", ""
    if cell.gap:
        return "gap", cell.gap
    log = workdir / "log.txt"
    output = log.read_text("utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(output) if line.strip()), "")
    if workdir.name in failed or last.startswith("error:"):
        return "failed", last or "no output"
    if (workdir / "summary.json").exists():
        return "finished", "not collected yet"
    if (workdir / "run.json").exists():
        steps = [logged["step"] for logged in read_rows(workdir)]
        return "unfinished", f"last logged at step {max(steps, default=0)}"
    return "not run", ""


def _rounded(value: float | None) -> float | None:
    """Six decimals; None, which the page shows as a dash, for a value that is not finite."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _curves(workdir: Path) -> list[dict[str, Any]]:
    """[{metric, points}] over training steps, points (step, least, mean, greatest) over seeds."""
    curves: dict[str, list[list[float]]] = {}
    for row in read_rows(workdir):
        for metric, values in row.items():
            known = [v for v in values if v is not None] if _per_seed(values) else []
            if known and metric not in NOT_CURVES:
                curves.setdefault(metric, []).append(_point(row["step"], known))
    return [
        {"metric": metric, "points": points[:: -(-len(points) // LONGEST_CURVE)]}
        for metric, points in curves.items()
    ]


def _lengths(cell: Cell, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """{metric, points} over the n of evaluations named length_<n>, if there are several; the cell's
    metric first."""
    found = {
        int(name.removeprefix("length_")): metrics
        for name, metrics in row["evaluations"].items()
        if re.fullmatch(r"length_\d+", name)
    }
    own = cell.metric.partition("/")[2]
    names = sorted(next(iter(found.values()), {}), key=lambda name: name != own)
    for metric in names if len(found) > 1 else ():
        values = {n: found[n].get(metric, ()) for n in sorted(found)}
        known = {n: [v for v in each if v is not None] for n, each in values.items()}
        points = [_point(n, each) for n, each in known.items() if each]
        yield {"metric": metric, "points": points}


def _per_seed(values: Any) -> bool:
    return isinstance(values, list)


def _point(x: float, values: Sequence[float]) -> list[float]:
    numbers = (min(values), statistics.fmean(values), max(values))
    return [x, *(float(f"{number:.6g}") for number in numbers)]
