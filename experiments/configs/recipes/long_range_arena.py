"""The Long Range Arena (Tay et al., ICLR 2021, arXiv 2011.04006): its recipes, and what papers set
for each of its tasks.

A table has a row for each entry of the config and in it one value for all tasks, or six in the
order of TASKS; None where the paper's is not known to us. Rows "epochs" and "warmup_epochs" become
steps; an epoch is the papers' training set, without a last batch that is not full.

The recipes are those of language models, which answer with a token. The papers' models read both
sides of a token and have a head of classes: `as_classifier` makes them of a recipe."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
# Config arguments for them at full size; ",smoke" is not published.
OWN = ("listops", "pathfinder")  # expressions and drawings of our own
ARGUMENTS = {f"lra_{task}": task for task in TASKS} | {task: task for task in OWN}
TRAIN_EXAMPLES = (96_000, 25_000, 147_086, 45_000, 160_000, 160_000)

# S4 (arXiv 2111.00396, as revised in 2022).
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
# The same of its blocks, for `as_classifier`.
S4_BLOCKS = {
    "model.norm": "batch",
    "model.pre_norm": (False, True, True, False, True, True),
    "model.dropout": (0.0, 0.0, 0.0, 0.1, 0.0, 0.0),
}
# Mean and standard deviation of what "linear" reads, in grey levels: of CIFAR-10 in grey, as S4's
# authors have it; of black and white for the drawings.
GREY = {"images": (122.6, 61.0), "pathfinder": (127.5, 127.5)}


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


def pathfinder(smoke: bool) -> ConfigDict:
    """Whether a path joins two discs, in drawings of our own."""
    config = _arena("pathfinder", task_options("pathfinder", data_dir="", points=12, distractors=2))
    if smoke:
        config.task.update({"size": 16, "points": 6, "distractors": 1})
        shrink(config, steps=300, batch_size=32, width=32, lr=3e-3)
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


def is_arena(argument: str) -> bool:
    """Whether a config argument is a task of the arena, at full size or smoke."""
    return argument.removesuffix(",smoke") in ARGUMENTS


def as_classifier(config: Any, *, norm: str, **options: Any) -> None:
    """Makes a recipe of the arena one of models/networks/sequence_classifier.py, which has the mean
    of all tokens classified. Retrieval then compares two documents, as in the benchmark; dropout
    draws once for all tokens; grey levels are numbers with encoder="linear", and other tokens are
    embedded in any case."""
    config.task.answer = "class"
    del config.model.tie_embeddings
    mean, std = GREY.get(config.task.name, (0.0, 1.0))
    if config.task.name not in GREY:
        options["encoder"] = "embedding"
    config.model.update(
        {
            "name": "sequence_classifier",
            "encoder": "embedding",
            "embedding_std": 1.0,
            "input_mean": mean,
            "input_std": std,
            "pooling": "mean",
            "head_width": 0,
            "norm": norm,
            "pre_norm": True,
            "dropout": 0.0,
            "tied_dropout": True,
            **options,
        }
    )


def for_mixer(mixer: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a table for options of a mixer: {option: values} with whole keys of the config."""
    return {f"model.mixers.{mixer}.{name}": row for name, row in options.items()}


def sequence_length(task: Any) -> Any:
    """T of the `task` of a config, at full size or smoke; it follows overrides."""
    if task.name == "listops":
        return task.get_ref("longest")
    if task.name == "text_classification":
        return task.get_ref("length")
    if task.name == "retrieval":  # with a head of classes each paper is a sequence
        return task.get_ref("length") * (2 if task.answer == "token" else 1)
    if task.name == "pathfinder":
        return task.get_ref("size") ** 2
    return 32 * 32  # CIFAR-10
