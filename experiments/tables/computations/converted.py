"""Denoisers that become others, for tables: a teacher is trained once for all its students."""

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import train
from experiments.configs import dit
from experiments.reporting.table import config_hash

# ((dotted key of a config, value), ...)
Changes = tuple[tuple[str, Any], ...]
Evaluations = dict[str, dict[str, float]]


def teacher(*, seed: int, recipe: str, changes: Changes) -> Evaluations:
    """{evaluation: {metric}} of DiT with softmax attention, after its last step."""
    return _first(_teacher(seed, recipe, changes)[1])


def student(
    *, seed: int, recipe: str, changes: Changes, config: str, student_changes: Changes
) -> Evaluations:
    """The same of what the config experiments/configs/<config>.py makes of this teacher, with
    to_teacher, the difference to what that says, among the metrics."""
    folder = Path(_teacher(seed, recipe, changes)[0].name)
    get_config = importlib.import_module(f"experiments.configs.{config}").get_config
    made = _changed(get_config(str(folder / "teacher")), student_changes)
    made.seeds = (seed,)
    return _first(train.run(made, folder / config_hash(made), brief=True))


@functools.cache
def _teacher(seed: int, recipe: str, changes: Changes) -> tuple[Any, dict[str, Any]]:
    """A folder that lasts as long as the process, with the teacher's run, and its summary."""
    folder = tempfile.TemporaryDirectory(prefix="scanax_converted_")
    config = _changed(dit.get_config(recipe), changes)
    config.seeds = (seed,)
    return folder, train.run(config, Path(folder.name) / "teacher", brief=True)


def _changed(config: Any, changes: Changes) -> ConfigDict:
    """The config with these entries changed."""
    config.update_from_flattened_dict(dict(changes))
    return config


def _first(summary: dict[str, Any]) -> Evaluations:
    """The evaluations of a run with one seed."""
    return {
        name: {metric: values[0] for metric, values in metrics.items()}
        for name, metrics in summary["evaluations"].items()
    }
