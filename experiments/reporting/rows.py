"""Result rows: appended by runs, never edited; tables, pages and figures are made from them.

Recorded rows are part of the checkout, and maintainers alone renew them. What a user runs is his
own: its rows lie with its workdirs."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reporting.code_changes import changes
from experiments.reporting.table import Cell, Choice, Computation, config_hash
from experiments.training.checkout import RESULTS, commit_here

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
# Of what a row has, that without which it cannot be shown.
NEEDED = (
    "scale",
    "config_hash",
    "commit",
    "dirty",
    "device",
    "platform",
    "device_count",
    "evaluations",
)


def make_row(table: str, scale: str, cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a finished run; `summary` as `train.run` returns it."""
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


def places(name: str, runs: Path, record: Path | None = None) -> tuple[Path, Path]:
    """Where rows of a table are appended, and the folder of the workdirs: of a user's own, both
    below `runs`. To renew the recorded ones, which lie in `record`, a folder for the commit at
    hand, so that no run of another commit is taken for one of this.

    Raises ValueError for `record` where no commit says what would be recorded."""
    if record is None:
        return runs / name, runs
    commit, dirty = commit_here()
    if commit is None or dirty:
        state = "no git checkout" if commit is None else f"{commit[:10]} with uncommitted changes"
        raise ValueError(f"--record must run at a commit, which its rows name; got {state}")
    return record, runs / f"recorded-{commit[:10]}"


def append(row: Mapping[str, Any], directory: Path = RESULTS) -> None:
    """Appends a row to <table>.jsonl in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{row['table']}.jsonl").open("a+b") as file:
        # A last line that lost its end in an editor would swallow this one.
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        ended = file.read(1) in (b"", b"\n")
        file.write((b"" if ended else b"\n") + json.dumps(row).encode() + b"\n")


def missing(
    cells: Sequence[Cell], found: Sequence[Mapping[str, Any] | None], *, renew: bool = False
) -> list[Cell]:
    """The cells to run: those without a row, and with `renew` those whose code has changed since,
    or may have. Of cells that read different metrics of one run, the first. None may choose
    (`runs_of`)."""
    lacking = {}
    for cell, row in zip(cells, found, strict=True):
        if not cell.gap and (row is None or (renew and changes(cell, row) != {})):
            lacking.setdefault(config_hash(cell.make_config()), cell)
    return list(lacking.values())


def read(table: str, directory: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a table, oldest first. Raises ValueError, with the line number, for a line that
    is not a row."""
    path = directory / f"{table}.jsonl"
    rows = []
    for number, line in enumerate(
        path.read_text("utf-8").splitlines() if path.exists() else (), start=1
    ):
        try:
            row = json.loads(line)
            lacking = set(NEEDED) - set(row if isinstance(row, dict) else ())
            if lacking:
                raise ValueError(f"it has no {', '.join(sorted(lacking))}")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not a result row ({error}); remove or mend it"
            ) from error
        rows.append(row)
    return rows


def matching(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], scale: str
) -> list[Mapping[str, Any] | None]:
    """The newest row of every cell: one of this scale, and of the config that the cell has today.
    Of a cell that chooses that of the best, with "choices": {variant: row}.

    None for a gap, for a cell that has no row, and for one that chooses and lacks one of them."""
    newest = {(row["scale"], row["config_hash"]): row for row in rows}

    def of(cell: Cell) -> Mapping[str, Any] | None:
        if cell.gap:
            return None
        found = {
            variant.variant: newest.get((scale, config_hash(variant.make_config())))
            for variant in cell.variants()
        }
        choices = {name: row for name, row in found.items() if row is not None}
        if len(choices) < len(found):
            return None
        return _chosen(cell, cell.choice, choices) if cell.choice else next(iter(choices.values()))

    return [of(cell) for cell in cells]


def _chosen(cell: Cell, choice: Choice, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The row whose mean over the seeds is the best; one with a seed that diverged is the worst,
    and of equal ones the first counts."""
    sign = 1 if choice.mode == "max" else -1

    def score(row: Mapping[str, Any]) -> float:
        values = _values(cell, row, choice.metric)
        return -math.inf if None in values else sign * statistics.fmean(values)

    return {**max(rows.values(), key=score), "choices": rows}


def origins(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The commits and machines that rows come from: numbers of several are not one experiment."""
    return {f"{commit(row)} on {machine(row)}" for row in rows}


def commit(row: Mapping[str, Any]) -> str:
    """Ten digits of the commit that a row was computed at, and whether files had changed since."""
    return (row["commit"] or "no commit")[:10] + ("+changes" if row["dirty"] else "")


def machine(row: Mapping[str, Any]) -> str:
    """The devices that a row was computed on: "1 x cpu (cpu)"."""
    return f"{row['device_count']} x {row['device']} ({row['platform']})"


def value_of(cell: Cell, row: Mapping[str, Any]) -> list[float]:
    """The cell's metric per seed. Raises ValueError for a row that does not have it."""
    return _values(cell, row, cell.metric)


def _values(cell: Cell, row: Mapping[str, Any], name: str) -> list[float]:
    evaluation, _, metric = name.partition("/")
    try:
        return row["evaluations"][evaluation][metric]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the row {cell.row!r}, {cell.column!r} (config_hash {row['config_hash']}) has no"
            f" metric {name!r}; remove it from the rows, and it is run anew"
        ) from error


def is_finite(cell: Cell, row: Mapping[str, Any]) -> bool:
    """Whether every seed has a number: rows hold None for what is not finite, because JSON
    cannot."""
    return None not in value_of(cell, row)
