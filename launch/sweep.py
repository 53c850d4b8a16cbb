"""Runs what a table or a sweep file still lacks, on an engine that exists, and collects the
results.

A table on this machine, or on a cluster; what would be submitted; what has finished, as a page:

    python -m launch.sweep --sweep=mqar --scale=cpu
    python -m launch.sweep --sweep=mqar --scale=gpu --backend=slurm \
        --resources=parallel=8,gpus=1,queue=gpu
    python -m launch.sweep --sweep=my_sweep.py --backend=jobset --dry_run
    python -m launch.sweep --sweep=my_sweep.py --collect --report=sweep.html

A sweep file is a table file without published numbers (experiments/reporting/table.py says what it
defines; `grid` expands options and seeds), optionally with RESOURCES. The same file runs on every
backend.

A run that has a row, or whose workdir has a summary, is not run again; one that failed is run again
`--retries` times, from its last checkpoint. Rows of finished runs are appended to
<runs>/<sweep>/<sweep>.jsonl. Interrupting the sweep tells all runs to save and ends; the same
command goes on. With --record a maintainer renews the recorded rows of a table instead, as
`python -m experiments.reproduce --record` does."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.reporting import figures, html, markdown, pages, rows
from experiments.reporting.sweep_file import find_sweep
from experiments.reporting.table import Cell
from experiments.training import command_line
from experiments.training.checkout import CHECKOUT, RESULTS
from experiments.training.command_line import Misuse
from launch.backend import make_resources
from launch.execution import execute
from launch.jobset import JobSet
from launch.local import Local
from launch.runs import Run, plan, with_failures
from launch.slurm import Slurm
from launch.xpk import Xpk

BACKENDS = {"local": Local, "slurm": Slurm, "jobset": JobSet, "xpk": Xpk}
LONGEST_CHECK_S = 300


def lacking(
    name: str,
    scale: str,
    planned: Sequence[tuple[Run, list[Cell]]],
    directory: Path,
    *,
    renew: bool = False,
) -> list[tuple[Run, Cell]]:
    """The runs without a row in `directory`, and with `renew` those whose code has changed since
    theirs, each with a cell that reads it."""
    read = rows.read(name, directory)
    each = [(run, cells[0]) for run, cells in planned]
    found = rows.matching([cell for _, cell in each], read, scale)
    wanted = rows.missing([cell for _, cell in each], found, renew=renew)
    return [(run, cell) for run, cell in each if cell in wanted]


def collect(
    name: str,
    sweep: Any,
    scale: str,
    planned: Sequence[tuple[Run, list[Cell]]],
    directory: Path,
    *,
    renew: bool = False,
) -> str:
    """Appends a row for every finished run that is `lacking`, and returns the table of all rows: of
    a table, beside what is recorded."""
    for run, cell in lacking(name, scale, planned, directory, renew=renew):
        if (summary := run.outcome().summary) is not None:
            rows.append(rows.make_row(name, scale, cell, summary), directory)
    cells = sweep.cells(scale)
    found = rows.matching(cells, rows.read(name, directory), scale)
    recorded = rows.matching(cells, rows.read(name), scale)
    cells = with_failures(cells, found, planned)
    figures.draw_table(sweep, cells, found, directory / f"{name}_{scale}.png")
    if renew:
        pages.renew(directory)
    if renew or not any(recorded):
        return markdown.section(sweep, name, scale, cells, found)
    return markdown.printed(sweep, name, scale, cells, recorded=recorded, own=found)


def check_runs(sweep: str, scale: str) -> None:
    """Has `experiments.check` look at the runs of a sweep, which needs jax and is therefore another
    process. Raises Misuse for a run that cannot work; prints what could not be checked."""
    sweep = str(Path(sweep).expanduser().absolute()) if sweep.endswith(".py") else sweep
    command = [sys.executable, "-m", "experiments.check", f"--sweep={sweep}", f"--scale={scale}"]
    # It computes nothing: an accelerator here is not for it.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_CHECK_S,
        )
    except subprocess.TimeoutExpired:
        print(f"not checked: it took more than {LONGEST_CHECK_S} s", file=sys.stderr)
        return
    words = done.stderr.strip().split("\n")[-1]
    if done.returncode == 2:
        raise Misuse(words.removeprefix("error: "))
    unchecked = done.stdout if not done.returncode else f"not checked: {words}\n"
    print(unchecked, end="", file=sys.stderr, flush=True)


def _asked(function: Callable[[], Any]) -> Any:
    """What a function returns whose mistakes are in what was asked for."""
    try:
        return function()
    except ValueError as error:
        raise Misuse(str(error)) from error


def main() -> None:
    options = flags.FLAGS
    name, sweep = find_sweep(options.sweep)
    scale = options.scale or next(iter(sweep.SCALES))
    folder = Path(options.runs).expanduser()
    if options.record and options.sweep.endswith(".py"):
        raise Misuse(f"--record is for tables, by name; got the file {options.sweep}")
    directory, folder = rows.places(name, folder, RESULTS if options.record else None)
    planned = plan(sweep, name, scale, folder)
    given = getattr(sweep, "RESOURCES", {})
    resources = _asked(lambda: make_resources(given, options.resources))
    wanted = lacking(name, scale, planned, directory, renew=options.record)
    todo = [run for run, _ in wanted if run.outcome().summary is None]
    failed: list[str] = []
    if not options.collect:
        backend = _asked(lambda: BACKENDS[options.backend](f"{name}-{scale}", resources))
        if todo:
            check_runs(options.sweep, scale)
        if options.dry_run:
            # A comment in all of the engines' languages.
            print(backend.render(todo) if todo else "# nothing is left to do")
            return
        failed = execute(backend, todo, retries=options.retries, poll_s=options.poll_s)
    print(collect(name, sweep, scale, planned, directory, renew=options.record))
    if options.report:
        report, own, recorded = Path(options.report), rows.read(name, directory), rows.read(name)
        shown = {"runs": folder, "recorded": recorded, "failed": failed}
        html.write(report, sweep, name, scale, own, **shown)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    flags.DEFINE_string(
        "sweep", None, "A table by name, or the path of a sweep file.", required=True
    )
    flags.DEFINE_string("scale", "", "One of the sweep's scales (default: its first).")
    flags.DEFINE_enum("backend", "local", list(BACKENDS), "The engine.")
    flags.DEFINE_list("resources", [], "key=value,... over the sweep's RESOURCES.")
    flags.DEFINE_string("runs", "runs", "Folder of the workdirs, shared with the runs.")
    flags.DEFINE_integer("retries", 1, "How often a run that failed is run again.")
    flags.DEFINE_float("poll_s", 2.0, "Seconds between two looks at the runs.")
    flags.DEFINE_bool("dry_run", False, "Print what would be submitted and stop.")
    flags.DEFINE_bool("collect", False, "Run nothing; collect what is finished.")
    flags.DEFINE_bool("record", False, "Renew a table's recorded rows (for maintainers).")
    flags.DEFINE_string("report", "", "Also write a page for the browser: its path.")
    command_line.run(main)
