"""Hedgehog (Zhang et al., ICLR 2024, arXiv 2402.04347), trained from scratch, or out of a run with
softmax attention.

    python -m experiments.train --config=experiments/configs/hedgehog.py:mqar,smoke \
        --workdir=runs/hedgehog
    python -m experiments.train --config=experiments/configs/hedgehog.py:runs/teacher \
        --workdir=runs/maps
    python -m experiments.train --config=experiments/configs/hedgehog.py:runs/maps \
        --workdir=runs/converted

mqar,smoke: minutes on 2 CPU cores. The paper's associative recall: accuracy 100 of softmax
attention, 17 of linear attention with 1 + elu. Converted to it, GPT-2 (125M) has a WikiText-103
perplexity of 16.7, against 15.8 with softmax.

With the workdir of a run with softmax attention feature maps learn its weights by cross-entropy,
alone; with that of a run of such maps all of the model is trained further, as GPT-2 was: rate 6e-4,
8 sequences, the steps of two passes over WikiText-103 in windows of 1024 tokens each."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import of_run
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.linearisation import fine_tuning, linearised

ALL_BUT_MAPS = (r"(?!.*/(?:query|key)_map/.*).*",)


def get_config(task: str) -> ConfigDict:
    if task.partition(",")[0] not in available_recipes():
        return converted(task)
    config: Any = recipe(task)
    options = mixer_options("hedgehog")
    if config.task.name == "mqar":
        options["heads"] = 2  # as the other models there
    config.model.pattern = ("hedgehog",)
    config.model.mixers = {"hedgehog": options}
    return config


def converted(run: str) -> ConfigDict:
    """The config of the first stage of the run in a workdir, or of the second."""
    source: Any = of_run.get_config(run)
    first = "hedgehog" not in source.model.pattern
    config = linearised(run, "hedgehog", stage="transfer" if first else "student")
    # 118M tokens of GPT-2's, twice.
    fine_tuning(config, lr=1e-2 if first else 6e-4, steps=28_800, batch_size=8)
    config.optimizer.frozen = ALL_BUT_MAPS if first else ()
    return config
