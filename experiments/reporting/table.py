"""A table of a paper as data: which runs fill it, and what was published.

A file experiments/tables/<name>.py defines

    TITLE, SOURCE      what the table is and where the published numbers stand
    SCALES             {scale: what was changed to fit it}
    METRIC             heading of the numbers
    cells(scale)       the cells, each one training run of one or more seeds, or a computation
    draw(axes, results)   the figure, from (cell, row) pairs; without it there is none
    SIZES              optional: True for a second grid of parameters and bytes of state
    RIVALS             optional: "column" if columns compete and not rows (reporting/orderings.py)
    orderings(cells)   optional: pairs of cells, of which a paper has a larger number for the first,
                       where that is not said by published numbers of the cells

and imports no jax, so that a launcher can read it anywhere.
"""

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from experiments.training.checkout import CHECKOUT
from experiments.training.config import fit_warmup, to_json


@dataclass(frozen=True)
class Choice:
    """Values of the config of which a cell takes the best, as papers choose a learning rate: every
    combination is a run of all seeds, and the mean over the seeds decides.

    options     {dotted key of the config: values}
    metric      "<evaluation>/<metric>" that decides, of another evaluation than the one shown
    mode        whether "max" or "min" is best
    """

    options: Mapping[str, Sequence[Any]]
    metric: str
    mode: str = "max"


@dataclass(frozen=True)
class Cell:
    """One number of a table: a config with overrides, trained with `seeds`.

    config          "<model config>:<task>", as for --config without folder and .py
    overrides       dotted keys of the config -> values
    metric          "<evaluation>/<metric>" of the run's summary
    published       the number beside which ours is printed, or None
    gap             why the cell is not run at this scale; "" if it is
    missing         what is said of a number that is not finite
    choice          what the best is taken of; None: nothing is chosen
    variant         of one of the runs that a cell chooses from: which; else ""
    """

    row: str
    column: str
    config: str
    metric: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    published: float | None = None
    gap: str = ""
    missing: str = "not finite"
    choice: Choice | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        if self.choice and _evaluation(self.choice.metric) == _evaluation(self.metric):
            raise ValueError(
                f"cell {self.row} / {self.column}: its number must be of another evaluation than"
                f" the one that chooses; got {self.metric} and {self.choice.metric}"
            )

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (f"{self.row} / {self.column}", self.variant)))

    def variants(self) -> "list[Cell]":
        """The runs that the cell chooses from, as cells without a choice; the cell itself if it has
        none."""
        if self.choice is None:
            return [self]
        found = []
        for values in itertools.product(*self.choice.options.values()):
            chosen = dict(zip(self.choice.options, values, strict=True))
            variant = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in chosen.items())
            overrides = {**self.overrides, **chosen}
            found.append(replace(self, overrides=overrides, choice=None, variant=variant))
        return found

    def make_config(self) -> ConfigDict:
        """The full config. Raises ValueError for a config that does not exist, a key that it does
        not have and a value of another type."""
        name, _, argument = self.config.partition(":")
        label = f"cell {self.label}"
        if name not in available_configs():
            raise ValueError(
                f"{label}: config must be <model>:<task>, with a model of"
                f" {', '.join(available_configs())}; got {self.config!r}"
            )
        config = importlib.import_module(f"experiments.configs.{name}").get_config(argument)
        for key, value in (*self.overrides.items(), ("seeds", self.seeds)):
            section: Any = config
            *path, last = key.split(".")
            for part in (*path, last):
                if not isinstance(section, ConfigDict) or part not in section:
                    raise ValueError(f"{label}: the config has no entry {key!r}")
                section = section[part] if part is not last else section
            try:
                section[last] = value
            except TypeError as error:
                raise ValueError(f"{label}: {key} cannot be {value!r}: {error}") from error
        fit_warmup(config, self.overrides)  # as the command of the cell does
        return config


@dataclass(frozen=True)
class Computation(Cell):
    """One number that is computed, not trained.

    config          "<module>:<function>" of experiments; the function takes `seed` and the
                    overrides as keywords and returns {evaluation: {metric: number}}
    overrides       its keyword arguments
    """

    def make_config(self) -> ConfigDict:
        """What the numbers follow from."""
        return ConfigDict(
            {"function": self.config, "arguments": dict(self.overrides), "seeds": self.seeds}
        )

    def evaluate(self) -> dict[str, dict[str, list[float]]]:
        """{evaluation: {metric: [per seed]}}, as training runs have it."""
        module, _, name = self.config.partition(":")
        function = getattr(
            importlib.import_module(f"experiments.tables.computations.{module}"), name
        )
        per_seed = [function(seed=seed, **self.overrides) for seed in self.seeds]
        return {
            evaluation: {
                metric: [values[evaluation][metric] for values in per_seed] for metric in metrics
            }
            for evaluation, metrics in per_seed[0].items()
        }


def _evaluation(metric: str) -> str:
    return metric.partition("/")[0]


def runs_of(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, and in the place of those that choose what they choose from."""
    return [variant for cell in cells for variant in cell.variants()]


def config_hash(config: ConfigDict) -> str:
    """Twelve hexadecimal digits of everything that a run computes from."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:12]


def workdir_name(cell: Cell) -> str:
    """A name that a reader recognises; its end, the config's hash, is what the run is found by."""
    named = f"{cell.row} {cell.column} {cell.variant}".lower()
    slug = re.sub(r"[^a-z0-9]+", "_", named).strip("_")
    return f"{slug[:100]}_{config_hash(cell.make_config())}"


def find_workdir(folder: Path, cell: Cell) -> Path:
    """Where in `folder` the run of a cell is: cells of one config share it, by whichever of them it
    is named."""
    name = workdir_name(cell)
    found = sorted(folder.glob(f"*_{name.rpartition('_')[2]}"))
    return found[0] if found else folder / name


def command(cell: Cell, workdir: Path) -> list[str]:
    """The command that trains a cell, to be run from the checkout."""
    overrides = {**cell.overrides, "seeds": cell.seeds}
    return [
        "python",
        "-m",
        "experiments.train",
        f"--config=experiments/configs/{cell.config.replace(':', '.py:', 1)}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]


def grid(
    config: str,
    metric: str,
    options: Mapping[str, Sequence[Any]],
    *,
    row: str = "",
    seeds: tuple[int, ...] = (0,),
    overrides: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """A cell for every combination of `options` {key: values}; the last key's values are the
    columns.

    row: heading of the rows, followed by the values of the other keys. overrides: what all cells
    share; a cell's own values win."""
    *outer, last = options
    cells = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        parts = [row, *(f"{key.split('.')[-1]} {chosen[key]}" for key in outer)]
        heading = ", ".join(part for part in parts if part)
        column = f"{last.split('.')[-1]} {chosen[last]}"
        merged = {**(overrides or {}), **chosen}
        cells.append(Cell(heading or config, column, config, metric, merged, seeds=seeds))
    return cells


def available_configs() -> tuple[str, ...]:
    """Names of the files in experiments/configs."""
    return tuple(sorted(file.stem for file in (CHECKOUT / "experiments/configs").glob("[!_]*.py")))


def available_tables() -> tuple[str, ...]:
    """Names of the files in experiments/tables."""
    return tuple(sorted(file.stem for file in (CHECKOUT / "experiments/tables").glob("*.py")))


def find_table(name: str) -> ModuleType:
    """The module of a table. Raises ValueError for a name that does not exist, with those that
    do."""
    if name not in available_tables():
        raise ValueError(
            f"--table must be one of {', '.join(available_tables())} (files in"
            f" experiments/tables); got {name!r}"
        )
    return importlib.import_module(f"experiments.tables.{name}")


def find_cells(table: ModuleType, scale: str) -> list[Cell]:
    """The cells of a table at a scale. Raises ValueError for a scale that it does not have."""
    if scale not in table.SCALES:
        raise ValueError(f"--scale must be one of {', '.join(table.SCALES)}; got {scale!r}")
    return table.cells(scale)
