"""Result rows: appended by runs, never edited; tables, RESULTS.md and figures are made from
them."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.reporting.table import Cell, Computation, config_hash
from experiments.training.checkout import RESULTS

FACTS = (
    "commit",
    "dirty",
    "versions",
    "device",
    "platform",
    "device_count",
    "process_count",
    "seeds",
    "parameters",
    "state_bytes",
    "provenance",
    "step",
    "rejected_steps",
    "seconds",
    "compile_seconds",
    "evaluations",
)


def make_row(table: str, scale: str, cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a finished run; `summary` as `train.run` returns it."""
    config: Any = cell.make_config()
    return {
        "table": table,
        "scale": scale,
        "row": cell.row,
        "column": cell.column,
        "config_hash": config_hash(config),
        "examples": (None if isinstance(cell, Computation) else config.steps * config.batch_size),
        # Computations read none, and runs that finished before they were counted do not say.
        "tokens": summary.get("tokens"),
        **{name: summary[name] for name in FACTS},
    }


def append(row: Mapping[str, Any], directory: Path = RESULTS) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{row['table']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(table: str, directory: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a table, oldest first. Raises ValueError, with the line number, for a line that
    is not a row."""
    path = directory / f"{table}.jsonl"
    rows = []
    for number, line in enumerate(
        path.read_text("utf-8").splitlines() if path.exists() else (), start=1
    ):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not a result row ({error}); remove or mend it"
            ) from error
    return rows


def matching(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], scale: str
) -> list[Mapping[str, Any] | None]:
    """For every cell its newest row: one of this scale whose config is the cell's of today."""
    newest = {(row["scale"], row["config_hash"]): row for row in rows}
    return [
        None if cell.gap else newest.get((scale, config_hash(cell.make_config()))) for cell in cells
    ]


def origins(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The commits and machines that rows come from: numbers of several are not one experiment."""
    return {f"{commit(row)} on {machine(row)}" for row in rows}


def commit(row: Mapping[str, Any]) -> str:
    return (row["commit"] or "no commit")[:10] + ("+changes" if row["dirty"] else "")


def machine(row: Mapping[str, Any]) -> str:
    return f"{row['device_count']} x {row['device']} ({row['platform']})"


def value_of(cell: Cell, row: Mapping[str, Any]) -> list[float]:
    """The cell's metric per seed."""
    evaluation, _, metric = cell.metric.partition("/")
    return row["evaluations"][evaluation][metric]


def is_finite(cell: Cell, row: Mapping[str, Any]) -> bool:
    """Whether every seed has a number: rows hold None for what is not finite, because JSON
    cannot."""
    return None not in value_of(cell, row)


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
    """The cells alone, as a table in Markdown."""
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


def markdown(
    table: ModuleType, name: str, scale: str, cells: Sequence[Cell], rows: Sequence[Any]
) -> str:
    """The table in Markdown, with where it was measured."""
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
            (
                f"Measured on {', '.join(where)}; {'; '.join(versions)}; commit"
                f" {', '.join(commits)}; {len(filled)} of {len(cells)} cells in"
                f" {minutes:.0f} minutes of training."
            ),
            "",
        ]
    return "\n".join(lines)


def figure(table: ModuleType, cells: Sequence[Cell], rows: Sequence[Any], path: Path) -> None:
    """Draws the table's figure from the rows there are, if there are any."""
    results = [
        (cell, row) for cell, row in zip(cells, rows, strict=True) if row and is_finite(cell, row)
    ]
    if not results or not hasattr(table, "draw"):
        return
    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    table.draw(axes, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=140)
    plt.close(picture)
