"""Reproduces a table of a paper: trains or computes the cells that are missing, prints ours beside
the paper's, draws the figure.

    python -m experiments.reproduce --table=state_tracking --scale=cpu
    python -m experiments.reproduce --table=state_tracking --scale=cpu --dry_run   what would run
    python -m experiments.reproduce --table=state_tracking --scale=cpu --collect   only its table

Resumable: a finished cell is read from its row, an interrupted one goes on from its checkpoint.
Rows are appended to experiments/results/<table>.jsonl; the figure is
experiments/results/<table>_<scale>.png and RESULTS.md there holds all tables."""

import re
import shlex
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import train
from experiments.reporting import figures, markdown, pages, rows
from experiments.reporting.table import (
    Computation,
    command,
    config_hash,
    find_cells,
    find_table,
    workdir_name,
)
from experiments.training import command_line, run_record
from experiments.training.checkout import RESULTS


def reproduce(
    name: str,
    scale: str,
    *,
    runs: Path,
    directory: Path = RESULTS,
    only: str = "",
    collect: bool = False,
) -> str:
    """Trains what is missing (unless `collect`; of the cells whose "row / column" matches `only`),
    returns the table.

    Raises ValueError for a table or scale that does not exist, before anything is trained.
    """
    table = find_table(name)
    cells = find_cells(table, scale)
    found = rows.matching(cells, rows.read(name, directory), scale)
    todo = {  # cells that read different metrics of one run share it
        config_hash(cell.make_config()): cell
        for cell, row in zip(cells, found, strict=True)
        if row is None
        and not cell.gap
        and not collect
        and re.search(only, f"{cell.row} / {cell.column}")
    }
    for number, cell in enumerate(todo.values(), start=1):
        print(f"[{number}/{len(todo)}] {cell.row} / {cell.column}", flush=True)
        began = time.monotonic()
        if isinstance(cell, Computation):
            summary = compute(cell)
        else:
            workdir = runs / name / scale / workdir_name(cell)
            summary = train.run(cell.make_config(), workdir)
        rows.append(rows.make_row(name, scale, cell, summary), directory)
        print(
            f"    {markdown.format_cell(cell, summary)} in {time.monotonic() - began:.0f} s",
            flush=True,
        )
    found = rows.matching(cells, rows.read(name, directory), scale)
    text = markdown.section(table, name, scale, cells, found)
    figures.draw_table(table, cells, found, directory / f"{name}_{scale}.png")
    pages.renew(directory)
    return text


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


def plan(name: str, scale: str) -> str:
    """What a reproduction would train, as commands."""
    lines = []
    for cell in find_cells(find_table(name), scale):
        lines.append(f"# {cell.row} / {cell.column}: {cell.gap or cell.metric}")
        if isinstance(cell, Computation):
            lines.append(f"#   computed by experiments.tables.computations.{cell.config}, no run")
        elif not cell.gap:
            workdir = Path("runs") / name / scale / workdir_name(cell)
            lines.append(shlex.join(command(cell, workdir)))
    return "\n".join(lines)


def main() -> None:
    options = flags.FLAGS
    if options.dry_run:
        print(plan(options.table, options.scale))
        return
    print(
        reproduce(
            options.table,
            options.scale,
            runs=Path(options.runs),
            only=options.only,
            collect=options.collect,
        )
    )
    print(f"Figure: {RESULTS / f'{options.table}_{options.scale}.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("table", None, "File of experiments/tables, without .py.", required=True)
    flags.DEFINE_string("scale", "cpu", "One of the table's scales.")
    flags.DEFINE_string("runs", "runs", "Directory of the workdirs.")
    flags.DEFINE_string(
        "only", "", "Regular expression: train only cells whose 'row / column' matches."
    )
    flags.DEFINE_bool("dry_run", False, "Print the commands of all cells and stop.")
    flags.DEFINE_bool("collect", False, "Train nothing; make the table from the rows there are.")
    command_line.run(main)
