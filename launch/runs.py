"""A sweep as runs: one command each, with a workdir in which its summary says that it is
finished."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.reporting.table import Cell, Computation, command, find_cells, workdir_name


@dataclass(frozen=True)
class Run:
    """name: unique in the sweep, and safe in paths; label: for people; command: to be run from the
    checkout."""

    name: str
    label: str
    workdir: Path
    command: tuple[str, ...]

    def summary(self) -> dict[str, Any] | None:
        """What the run left when it finished, or None. Raises ValueError for a summary that is not
        JSON."""
        path = self.workdir / "summary.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); remove it") from error


def plan(sweep: ModuleType, name: str, scale: str, runs: Path) -> list[tuple[Run, list[Cell]]]:
    """The runs of a sweep, each with the cells that read it; gaps and computed cells need none.

    Raises ValueError for a scale that the sweep does not have, or a cell whose config does not
    exist."""
    cells_of: dict[str, list[Cell]] = {}
    for cell in find_cells(sweep, scale):
        if not cell.gap and not isinstance(cell, Computation):
            cells_of.setdefault(workdir_name(cell), []).append(cell)
    planned = []
    # Runs work in the checkout, or where a cluster's image has it: not where the launcher does.
    runs = runs.expanduser().absolute()
    for workdir, cells in cells_of.items():
        path = runs / name / scale / workdir
        label = f"{cells[0].row} / {cells[0].column}"
        run = Run(workdir, label, path, tuple(command(cells[0], path)))
        planned.append((run, cells))
    return planned
