"""Tables and sweep files as a user names them; what is wrong with one costs a line that says where.

A sweep file is a table file without published numbers (reporting/table.py), anywhere."""

import difflib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.reporting.table import Cell, available_tables, find_cells, find_table, runs_of
from experiments.training.command_line import Misuse

REQUIRED = ("TITLE", "METRIC", "SCALES", "cells")


def find_sweep(sweep: str) -> tuple[str, ModuleType]:
    """Name and module of a table (by name) or of a sweep file (by path).

    Raises Misuse for a name that is no table and a file that is no sweep.
    """
    if not sweep.endswith(".py"):
        try:
            return sweep, find_table(sweep)
        except ValueError as error:
            close = difflib.get_close_matches(sweep, available_tables(), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ", or a sweep file, as <path>.py"
            raise Misuse(f"{error}{hint}") from error
    path = Path(sweep).expanduser()
    if not path.is_file():
        raise Misuse(f"--sweep: there is no file {path}")
    # Not under the file's own name, by which a library may be known.
    spec = importlib.util.spec_from_file_location(f"sweep_file_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    _called(path, functools.partial(spec.loader.exec_module, module))
    _check(module, path)
    return path.stem, module


def cells_of(sweep: ModuleType, scale: str) -> list[Cell]:
    """The cells of a table or a sweep at a scale, each with a config that exists.

    Raises Misuse for a scale that the sweep does not have and for cells that cannot be."""
    path = Path(sweep.__file__ or "")
    if scale not in sweep.SCALES:
        raise Misuse(f"--scale must be one of {', '.join(sweep.SCALES)}; got {scale!r}")
    cells = _called(path, lambda: find_cells(sweep, scale))
    if not isinstance(cells, list | tuple) or not all(isinstance(cell, Cell) for cell in cells):
        raise Misuse(f"--sweep: {path}: cells({scale!r}) must be a list of Cell; got {cells!r:.99}")
    for cell in runs_of(cells):
        try:
            cell.make_config()
        except ValueError as error:
            raise Misuse(f"--sweep: {path}: {error}") from error
    return list(cells)


def _check(module: ModuleType, path: Path) -> None:
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise Misuse(f"--sweep: {path} does not define {', '.join(missing)}")
    kinds: dict[str, tuple[type, str]] = {
        "TITLE": (str, "a text"),
        "METRIC": (str, "a text"),
        "SCALES": (dict, "{scale: what it is}, with at least one"),
        "RESOURCES": (dict, "{resource: value}"),
    }
    for name, (kind, expected) in kinds.items():
        value = getattr(module, name, kind())
        if not isinstance(value, kind) or (name == "SCALES" and not value):
            raise Misuse(f"--sweep: {path}: {name} must be {expected}; got {value!r:.200}")
    if not callable(module.cells):
        raise Misuse(f"--sweep: {path}: cells must be a function of the scale")


def _called(path: Path, function: Callable[[], Any]) -> Any:
    """What a function of a user's file returns. Raises Misuse with the line for what it raises."""
    try:
        return function()
    except Exception as error:  # whatever it is, it is the file's
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename) == path.absolute()]
        at = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
        line = f", line {at}" if at else ""
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        raise Misuse(f"--sweep: {path}{line}: {type(error).__name__}: {words}") from error
