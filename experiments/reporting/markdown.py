"""Tables in Markdown, from recorded rows."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from experiments.reporting.rows import commit, is_finite, machine, value_of
from experiments.reporting.table import Cell


def format_cell(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "mean ± sample deviation (n) [published]"; a gap says why."""
    if row is None:
        ours = cell.gap or "not run"
    else:
        values = value_of(cell, row)
        if is_finite(cell, row):
            spread = f" ± {_number(statistics.stdev(values))}" if values[1:] else ""
            ours = f"{_number(statistics.fmean(values))}{spread} (n={len(values)})"
        else:
            ours = f"{cell.missing} (n={len(values)})"
    return ours if cell.published is None else f"{ours} [{_number(cell.published)}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def format_sizes(cell: Cell, row: Mapping[str, Any] | None) -> str:
    """ "parameters / bytes"; a model that does not decode has no state."""
    if row is None:
        return ""
    parameters, state_bytes = row["parameters"], row["state_bytes"]
    state = "none" if state_bytes is None else f"{state_bytes:,}"
    return f"{parameters:,} / {state}"


def grid(
    cells: Sequence[Cell], rows: Sequence[Any], format_one: Callable[[Cell, Any], str] = format_cell
) -> str:
    """The cells alone, as a table; `rows` as `matching` of reporting/rows.py returns them."""
    columns, names = (
        list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in ("column", "row")
    )
    text = {(c.row, c.column): format_one(c, r) for c, r in zip(cells, rows, strict=True)}
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        *(
            f"| {row} | " + " | ".join(text.get((row, column), "") for column in columns) + " |"
            for row in names
        ),
    ]
    return "\n".join(lines)


def section(
    table: ModuleType, name: str, scale: str, cells: Sequence[Cell], rows: Sequence[Any]
) -> str:
    """The section of a table: title, what was measured, the cells, and where they were measured."""
    published = any(cell.published is not None for cell in cells)
    source = getattr(table, "SOURCE", "nothing is published")
    source = f"in brackets: {source}" if published else source
    lines = [
        f"## {table.TITLE}: `{name}` at scale `{scale}`",
        "",
        f"{table.METRIC}. Mean ± sample standard deviation over n seeds; {source}",
        "",
        f"Scale `{scale}`: {table.SCALES[scale]}",
        "",
        grid(cells, rows),
        "",
    ]
    if getattr(table, "SIZES", False) and any(rows):
        lines += ["Parameters / bytes of state per sequence:", ""]
        lines += [grid(cells, rows, format_sizes), ""]
    filled = [row for row in rows if row]
    # Cells may read different metrics of one run.
    done = list({row["config_hash"]: row for row in filled}.values())
    if done:
        minutes = sum(row["seconds"] for row in done) / 60
        where = sorted({machine(row) for row in done})
        versions = sorted(
            {f"jax {row['versions']['jax']}, flax {row['versions']['flax']}" for row in done}
        )
        commits = sorted({commit(row) for row in done})
        lines += [
            f"Measured on {', '.join(where)}; {'; '.join(versions)}; commit {', '.join(commits)};"
            f" {len(filled)} of {len(cells)} cells in {minutes:.0f} minutes of training.",
            "",
        ]
    return "\n".join(lines)
