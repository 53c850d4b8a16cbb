"""The Long Range Arena (Tay et al., ICLR 2021, arXiv 2011.04006): what papers set for each of its
tasks.

A table has a row for each entry of the config and in it one value for all tasks, or six in the
order of TASKS; None where the paper's is not known to us. Rows "epochs" and "warmup_epochs" become
steps; an epoch is the papers' training set, without a last batch that is not full."""

from collections.abc import Mapping
from typing import Any

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


def set_as_published(config: Any, argument: str, table: Mapping[str, Any] | None = None) -> None:
    """Sets what `table` has for the task of a config argument, and what it lacks as S4; nothing for
    other arguments."""
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
    """Rows of a table, for options of a mixer."""
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
