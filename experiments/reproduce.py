"""Reproduces a table of a paper: trains or computes the cells that you have not yet, and prints
published, recorded and your numbers side by side.

    python -m experiments.reproduce --table=state_tracking --scale=cpu
    python -m experiments.reproduce --table=state_tracking --scale=cpu --only=DeltaNet
    python -m experiments.reproduce --table=state_tracking --scale=cpu --dry_run
    python -m experiments.reproduce --table=state_tracking --scale=cpu --collect
    python -m experiments.reproduce --table=state_tracking --scale=cpu --recorded

The first trains everything, the second some rows. The others train nothing: they print the commands
of all cells, the table as it stands, and the recorded rows alone.

Resumable: a finished cell is read from its row, an interrupted one goes on from its checkpoint.
Your rows are in runs/<table>/<table>.jsonl, the figure beside them, the runs in
runs/<table>/<scale>; no file of the checkout changes. Recorded rows are those in
experiments/results. A maintainer renews them with --record, at a commit: it runs cells without a
recorded row and those whose code has changed since, and makes RESULTS.md and the tables in
documents anew."""

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import train
from experiments.reporting import figures, markdown, pages, rows
from experiments.reporting.table import (
    Cell,
    Computation,
    command,
    find_cells,
    find_table,
    find_workdir,
    runs_of,
)
from experiments.training import command_line, run_record
from experiments.training.checkout import RESULTS


def reproduce(
    name: str,
    scale: str,
    *,
    runs: Path,
    only: str = "",
    collect: bool = False,
    record: bool = False,
    results: Path = RESULTS,
) -> str:
    """Trains what is missing (unless `collect`; of the cells whose "row / column" matches `only`),
    returns the table. `record` renews the recorded rows in `results`, and the pages that show them.

    Raises ValueError for a table or scale that does not exist, and for `record` where files differ
    from their commit, before anything is trained.
    """
    table = find_table(name)
    cells = find_cells(table, scale)
    directory, workdirs = rows.places(name, runs, results if record else None)
    each = runs_of(cells)
    found = rows.matching(each, rows.read(name, directory), scale)
    todo = [] if collect else rows.missing(each, found, renew=record)
    todo = [cell for cell in todo if re.search(only, f"{cell.row} / {cell.column}")]
    _run(todo, name, scale, directory, workdirs / name / scale)
    own = rows.matching(cells, rows.read(name, runs / name), scale)
    recorded = rows.matching(cells, rows.read(name, results), scale)
    shown = recorded if record else own
    figures.draw_table(table, cells, shown, directory / f"{name}_{scale}.png")
    if record:
        pages.renew(results)
    return markdown.printed(table, name, scale, cells, recorded=recorded, own=own)


def _run(todo: Sequence[Cell], name: str, scale: str, directory: Path, workdirs: Path) -> None:
    """Trains or computes cells, and appends their rows."""
    for number, cell in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {cell.label}", flush=True)
        began = time.monotonic()
        if isinstance(cell, Computation):
            summary = compute(cell)
        else:
            summary = train.run(cell.make_config(), find_workdir(workdirs, cell), brief=True)
        row = rows.make_row(name, scale, cell, summary)
        rows.append(row, directory)
        seconds = time.monotonic() - began
        print(f"    {markdown.format_cell(cell, row)} in {seconds:.0f} s", flush=True)


def compute(cell: Computation) -> dict[str, Any]:
    """The summary of a computation, with the facts of a run that it has."""
    began = time.monotonic()
    return {
        **dict.fromkeys(rows.FACTS),
        **run_record.environment(),
        "seeds": list(cell.seeds),
        "evaluations": cell.evaluate(),
        "seconds": time.monotonic() - began,
    }


def plan(name: str, scale: str, runs: Path = Path("runs")) -> str:
    """What a reproduction would train, as commands."""
    lines = []
    for cell in runs_of(find_cells(find_table(name), scale)):
        lines.append(f"# {cell.label}: {cell.gap or cell.metric}")
        if isinstance(cell, Computation):
            lines.append(f"#   computed by experiments.tables.computations.{cell.config}, no run")
        elif not cell.gap:
            workdir = find_workdir(runs / name / scale, cell)
            lines.append(shlex.join(command(cell, workdir)))
    return "\n".join(lines)


def recorded_section(name: str, scale: str) -> str:
    """The table of the recorded rows, as it stands on the page of results."""
    table = find_table(name)
    cells = find_cells(table, scale)
    found = rows.matching(cells, rows.read(name), scale)
    return markdown.section(table, name, scale, cells, found)


def main() -> None:
    options = flags.FLAGS
    name, scale, runs = options.table, options.scale, Path(options.runs).expanduser()
    if options.dry_run:
        print(plan(name, scale, runs))
    elif options.recorded:
        print(recorded_section(name, scale))
    else:
        chosen = {"only": options.only, "collect": options.collect, "record": options.record}
        print(reproduce(name, scale, runs=runs, **chosen))
        figure = (RESULTS if options.record else runs / name) / f"{name}_{scale}.png"
        if figure.exists():
            print(f"Figure: {figure}")


if __name__ == "__main__":
    flags.DEFINE_string("table", None, "File of experiments/tables, without .py.", required=True)
    flags.DEFINE_string("scale", "cpu", "One of the table's scales.")
    flags.DEFINE_string("runs", "runs", "Directory of the workdirs and of your rows.")
    flags.DEFINE_string(
        "only", "", "Regular expression: train only cells whose 'row / column' matches."
    )
    flags.register_validator("only", command_line.check_pattern)
    flags.DEFINE_bool("dry_run", False, "Print the commands of all cells and stop.")
    flags.DEFINE_bool("collect", False, "Train nothing; print the table as it stands.")
    flags.DEFINE_bool("recorded", False, "Train nothing; print the recorded rows alone.")
    flags.DEFINE_bool("record", False, "Renew the recorded rows (for maintainers).")
    command_line.run(main)
