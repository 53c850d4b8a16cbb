"""Whether the code of a row has changed since the row was made, as far as git can tell.

The code of a training run are the modules that its task, its network, its mixers and the training
program import or name, directly or through others; of a computation, those of its function. A
commit that touches one of them counts, whatever it changed there: that overstates a change, and
hides none. Kernels count for runs on the platform that has them."""

import ast
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.reporting.table import Cell, Computation
from experiments.training.checkout import CHECKOUT, git

PROGRAM = ("program", "loop", "batches")
PLATFORMS = ("tpu", "gpu")  # that have kernels: pallas_<platform>.py, ops/<platform>/
OURS = ("ops", "models", "experiments")
UNCOMMITTED = "uncommitted"
MOST = 5  # parts that a line names
# What shows and keeps numbers, and computes none.
SHOWN = ("experiments/reporting/", "experiments/training/progress.py")


def changes(cell: Cell, row: Mapping[str, Any]) -> dict[str, set[str]] | None:
    """{commit since the row's that touches its code: the parts that it touches}; None where git
    does not know. Files that were or are not committed are a commit more."""
    history = _history(row["commit"]) if row["commit"] else None
    if history is None:
        return None
    files = code_of(cell, row["platform"])
    found = {name: {_part(file) for file in touched & files} for name, touched in history}
    found = {name: parts for name, parts in found.items() if parts}
    if row["dirty"]:
        found.setdefault(UNCOMMITTED, set()).add("files that differed from their commit")
    return found


def describe(pairs: Iterable[tuple[Cell, Mapping[str, Any]]]) -> list[str]:
    """For each commit that rows of a table were made at, a line: where their code has changed
    since."""
    of_commit: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, row in pairs:
        of_commit.setdefault(row["commit"] or "", []).append((cell, row))
    lines = []
    for commit, rows in of_commit.items():
        merged: dict[str, set[str]] = {}
        known = [changes(cell, row) for cell, row in rows]
        for found in known:
            for name, parts in (found or {}).items():
                merged.setdefault(name, set()).update(parts)
        counts = Counter(part for parts in merged.values() for part in parts)
        named = ", ".join(f"{part} ({count})" for part, count in counts.most_common(MOST))
        more = f" and {len(counts) - MOST} more" if len(counts) > MOST else ""
        if None in known:
            what = "unknown, no history with it here"
        elif merged:
            commits = len(merged.keys() - {UNCOMMITTED})
            what = f"changed in {commits} commits: {named}{more}"
        else:
            what = "the same"
        lines.append(f"since {commit[:10] or 'no commit'} {what}")
    return lines


def code_of(cell: Cell, platform: str | None) -> frozenset[str]:
    """The files, below the checkout, that the numbers of a cell follow from."""
    if isinstance(cell, Computation):
        roots = [f"experiments/tables/computations/{cell.config.partition(':')[0]}.py"]
        if "config" in cell.overrides:  # of a run that is compiled, for whichever platform
            roots += _roots(replace(cell, config=cell.overrides["config"], overrides={}))
        return _closure(tuple(roots))
    others = [name for name in PLATFORMS if name != platform]
    return frozenset(
        file
        for file in _closure(tuple(_roots(cell)))
        if not any(f"/pallas_{name}" in file or f"ops/{name}/" in file for name in others)
    )


def _roots(cell: Cell) -> list[str]:
    config: Any = Cell.make_config(cell)
    modules = [f"models.networks.{config.model.name}", f"experiments.tasks.{config.task.name}"]
    modules += [f"models.{mixer}" for mixer in config.model.get("pattern", ())]
    modules += [f"experiments.training.{name}" for name in PROGRAM]
    return [path for module in modules if (path := _file(module))]


@functools.cache
def _closure(roots: tuple[str, ...]) -> frozenset[str]:
    found, open_files = set(roots), list(roots)
    while open_files:
        new = set(_imports(open_files.pop())) - found
        found |= new
        open_files += new
    return frozenset(file for file in found if not file.startswith(SHOWN))


@functools.cache
def _imports(file: str) -> tuple[str, ...]:
    """The files of ours that a file imports, or names in a string, as commands do. Of the package
    ops it is those whose names are used: the package itself has all ops."""
    names: list[str] = []
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse((CHECKOUT / file).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name != "ops"]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            used = [alias.name for alias in node.names]
            names += [_exported(name) for name in used] if module == "ops" else [module]
            names += [f"{module}.{name}" for name in used]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names += [_exported(node.attr)] if node.value.id == "ops" else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)
    return tuple(path for name in names if name.split(".")[0] in OURS and (path := _file(name)))


@functools.cache
def _exported(name: str) -> str:
    """The module that a name of the package ops comes from; "" for none."""
    tree = ast.parse((CHECKOUT / "ops/__init__.py").read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = (n.module for n in imports for alias in n.names if name in (alias.name, alias.asname))
    return f"ops.{next(found, '')}"


@functools.cache
def _file(module: str) -> str | None:
    """The file of a module or a package; None if there is none of this name."""
    if "" in module.split("."):
        return None
    path = module.replace(".", "/")
    places = (f"{path}.py", f"{path}/__init__.py")
    return next((place for place in places if (CHECKOUT / place).is_file()), None)


@functools.cache
def _history(commit: str) -> tuple[tuple[str, frozenset[str]], ...] | None:
    """(commit, files that it touches) of all since `commit`, and of uncommitted changes; None for a
    commit that is not in the history here."""
    if git("merge-base", "--is-ancestor", commit, "HEAD") is None:
        return None
    log = git("log", "--format=%x00%H", "--name-only", "--no-renames", f"{commit}..HEAD")
    here = git("diff", "--name-only", "HEAD")
    if log is None or here is None:
        return None
    each = [text.split("\n") for text in log.split("\0") if text]
    each.append([UNCOMMITTED, *here.split("\n")])
    return tuple((name, frozenset(files)) for name, *files in each)


def _part(file: str) -> str:
    """The folder of a file, as ops/delta_rule or experiments/training; the file of a model."""
    path = Path(file)
    return file if path.parent.name == "models" else "/".join(path.parts[:2])
