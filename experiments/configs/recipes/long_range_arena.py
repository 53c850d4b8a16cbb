"""The Long Range Arena (Tay et al., ICLR 2021, arXiv 2011.04006): its recipes, and what papers set
for each of its tasks.

A table has a row for each entry of the config and in it one value for all tasks, or six in the
order of TASKS; None where the paper's is not known to us. Rows "epochs" and "warmup_epochs" become
steps; an epoch is the papers' training set, without a last batch that is not full."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
# Config arguments for them at full size; ",smoke" is not published.
ARGUMENTS = {f"lra_{task}": task for task in TASKS} | {"listops": "listops"}
TRAIN_EXAMPLES = (96_000, 25_000, 147_086, 45_000, 160_000, 160_000)

# S4 (arXiv 2111.00396, as revised in 2022). Its models are bidirectional; Image has dropout 0.1.
S4 = {
    "batch_size": (32, 16, 64, 50, 64, 16),
    "epochs": (40, 32, 20, 200, 200, 50),
    "warmup_epochs": (4.0, 3.2, 2.0, 20.0, 20.0, 5.0),  # a tenth
    "model.depth": 6,
    "model.width": (256, 256, 256, 512, 256, 256),
    "optimizer.lr": (1e-2, 1e-2, 1e-2, 1e-2, 4e-3, 1e-3),
    "optimizer.weight_decay": 0.05,
}
# The same of its layers, and of S4D's.
S4_LAYERS = {"state_size": (4, 4, 4, 64, 64, 64), "dt_min": (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4)}


def listops(smoke: bool) -> ConfigDict:
    """ListOps, with expressions of our own."""
    config = _arena("listops", task_options("listops"))
    if smoke:
        config.task.update({"shortest": 8, "longest": 64, "depth": 3, "arguments": 4})
        shrink(config, steps=300, batch_size=32, width=32, lr=3e-3)
    return config


def lra_listops(smoke: bool) -> ConfigDict:
    """ListOps, with the released expressions; at smoke size those of listops, which need no
    files."""
    config: Any = listops(smoke)
    if not smoke:
        config.task.data_dir = "~/lra_release/listops-1000"
    return config


def lra_text(smoke: bool) -> ConfigDict:
    """Reviews of IMDB, byte by byte."""
    config = _arena("lra_text", task_options("text_classification"))
    if smoke:
        config.task.length = 512
        shrink(config, steps=300, batch_size=8, width=32, lr=3e-3)
    return config


def lra_retrieval(smoke: bool) -> ConfigDict:
    """Pairs of papers, byte by byte."""
    config = _arena("lra_retrieval", task_options("retrieval"))
    if smoke:
        config.task.length = 256
        shrink(config, steps=300, batch_size=8, width=32, lr=3e-3)
    return config


def lra_image(smoke: bool) -> ConfigDict:
    """CIFAR-10 in grey, its pixels as tokens where state-space papers have numbers."""
    config = _arena("lra_image", task_options("images", dataset="cifar10", grey=True))
    if smoke:
        shrink(config, steps=200, batch_size=8, width=32, lr=3e-3)
    return config


def lra_pathfinder(smoke: bool) -> ConfigDict:
    """Whether a path joins two dots, in images of 32 x 32."""
    config = _arena("lra_pathfinder", task_options("pathfinder"))
    if smoke:
        shrink(config, steps=200, batch_size=8, width=32, lr=3e-3)
    return config


def lra_pathx(smoke: bool) -> ConfigDict:
    """Path-X: the same in images of 128 x 128."""
    released = "~/lra_release/lra_release/pathfinder128"
    config = _arena("lra_pathx", task_options("pathfinder", data_dir=released, size=128))
    if smoke:
        shrink(config, steps=40, batch_size=2, width=32, lr=3e-3)
        config.eval.examples = 8
    return config


def _arena(argument: str, task: Mapping[str, Any]) -> Any:
    """A task at S4's settings, evaluated after every epoch on all that there is."""
    config = base(
        task=task,
        model=language_model(width=0, depth=0),
        steps=0,
        batch_size=0,
        optimizer={},
        evaluation={"examples": 25_000, "best_metric": "validation/accuracy"},
    )
    set_as_published(config, argument)
    return config


def set_as_published(config: Any, argument: str, table: Mapping[str, Any] | None = None) -> None:
    """Sets what `table` has for the task of a config argument, and S4's values where it has none.
    An argument that is no task of the arena at full size changes nothing."""
    if argument not in ARGUMENTS:
        return
    place = TASKS.index(ARGUMENTS[argument])

    def known(table: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: row[place] if isinstance(row, tuple) else row for key, row in table.items()}
        return {key: value for key, value in values.items() if value is not None}

    values = known(S4) | known(table or {})
    epoch = TRAIN_EXAMPLES[place] // values["batch_size"]
    config.steps = values.pop("epochs") * epoch
    config.optimizer.warmup_steps = round(values.pop("warmup_epochs") * epoch)
    config.eval.every_steps = epoch
    config.update_from_flattened_dict(values)


def for_mixer(mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a table for options of a mixer: {option: values} with whole keys of the config."""
    return {f"model.mixers.{mixer}.{name}": row for name, row in options.items()}


def sequence_length(task: Any) -> Any:
    """T of the `task` of a config, at full size or smoke; it follows overrides."""
    if task.name == "listops":
        return task.get_ref("longest")
    if task.name == "text_classification":
        return task.get_ref("length")
    if task.name == "retrieval":
        return 2 * task.get_ref("length")
    if task.name == "pathfinder":
        return task.get_ref("size") ** 2
    return 32 * 32  # CIFAR-10
