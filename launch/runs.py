"""A sweep as runs: one command each, with a workdir in which its summary says that it is
finished."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from experiments.reporting.rows import FACTS
from experiments.reporting.sweep_file import cells_of
from experiments.reporting.table import (
    Cell,
    Computation,
    command,
    config_hash,
    find_workdir,
    runs_of,
)

# Mistakes that may be gone the next time: of the system, and of a process that still ends.
PASSING = re.compile(r"error: (\[Errno|another process)")


class Outcome(NamedTuple):
    """summary: of a run that is finished, or None; problem: why what it left is no such summary;
    lasting: whether it would be the same if the run were given again."""

    summary: dict[str, Any] | None
    problem: str = ""
    lasting: bool = False


@dataclass(frozen=True)
class Run:
    """name: unique in the sweep, and safe in paths; label: for people; command: to be run from the
    checkout; metrics: what the summary must have, as "<evaluation>/<metric>"."""

    name: str
    label: str
    workdir: Path
    command: tuple[str, ...]
    metrics: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """Where the output of the run is."""
        return self.workdir / "log.txt"

    def summary(self) -> dict[str, Any] | None:
        """What the run left when it finished, or None. Raises ValueError for a summary that is not
        JSON."""
        path = self.workdir / "summary.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error})") from error

    def outcome(self) -> Outcome:
        """How the run ended, if it did. What is wrong with its summary is its own failure."""
        path = self.workdir / "summary.json"
        try:
            summary = self.summary()
        except (ValueError, OSError) as error:
            return Outcome(None, str(error))
        if summary is None:
            return Outcome(None)
        if not isinstance(summary, dict):
            return Outcome(None, f"{path} is not the summary of a run")
        if not self.metrics:
            return Outcome(summary)
        lacking = [name for name in FACTS if name not in summary]
        if lacking:
            return Outcome(None, f"{path} is not the summary of a run: no {', '.join(lacking)}")
        found = _metrics(summary["evaluations"])
        missing = [name for name in self.metrics if name not in found]
        if missing:
            has = ", ".join(found) or "none"
            problem = f"{path} has no metric {', '.join(missing)}; it has {has}"
            return Outcome(None, problem, lasting=True)
        return Outcome(summary)

    def last_error(self, start: int = 0) -> str:
        """The line "error: ..." with which the output of the run ends from byte `start` on, or
        ""."""
        try:
            with self.log.open("rb") as file:
                file.seek(start)
                lines = file.read().decode("utf-8", "replace").split("\n")
        except OSError:
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last if last.startswith("error: ") else ""

    def note_failure(self, why: str) -> None:
        """Has the output end with an error, if it does not: by that others see a run as failed."""
        if not self.last_error():
            self.workdir.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"error: {why}\n")


def lasts(error: str) -> bool:
    """Whether a run that ended with the line `error` would end so again."""
    return bool(error) and not PASSING.match(error)


def plan(sweep: ModuleType, name: str, scale: str, runs: Path) -> list[tuple[Run, list[Cell]]]:
    """The runs of a sweep, each with the cells that read it; gaps and computed cells need none.

    Raises ValueError for a scale that the sweep does not have, or a cell whose config does not
    exist."""
    readers: dict[str, list[Cell]] = {}
    for cell in runs_of(cells_of(sweep, scale)):
        if not cell.gap and not isinstance(cell, Computation):
            readers.setdefault(config_hash(cell.make_config()), []).append(cell)
    planned = []
    # Runs work in the checkout, or where a cluster's image has it: not where the launcher does.
    runs = runs.expanduser().absolute()
    for cells in readers.values():
        path = find_workdir(runs / name / scale, cells[0])
        metrics = tuple(dict.fromkeys(cell.metric for cell in cells))
        run = Run(path.name, cells[0].label, path, tuple(command(cells[0], path)), metrics)
        planned.append((run, cells))
    return planned


def with_failures(
    cells: Sequence[Cell], found: Sequence[Any], planned: Sequence[tuple[Run, list[Cell]]]
) -> list[Cell]:
    """The cells; of those without a row (`found`, as `matching` of reporting/rows.py returns them)
    whose run failed, the reason that there is no number is that."""
    failed = {
        config_hash(readers[0].make_config())
        for run, readers in planned
        if run.last_error() or run.outcome().problem
    }
    return [
        cell if row or cell.gap or failed.isdisjoint(_hashes(cell)) else replace(cell, gap="failed")
        for cell, row in zip(cells, found, strict=True)
    ]


def _hashes(cell: Cell) -> set[str]:
    return {config_hash(variant.make_config()) for variant in cell.variants()}


def _metrics(evaluations: Any) -> list[str]:
    """<evaluation>/<metric> of all numbers per seed in a summary."""
    if not isinstance(evaluations, dict):
        return []
    return [
        f"{name}/{metric}"
        for name, values in evaluations.items()
        if isinstance(values, dict)
        for metric, per_seed in values.items()
        if isinstance(per_seed, list) and per_seed
    ]
