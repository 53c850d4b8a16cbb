"""Hedgehog (Zhang et al., ICLR 2024, arXiv 2402.04347), trained from scratch.

    python -m experiments.train --config=experiments/configs/hedgehog.py:mqar,smoke \
        --workdir=runs/hedgehog

mqar,smoke: minutes on 2 CPU cores. The paper's associative recall: accuracy 100 of softmax
attention, 17 of linear attention with 1 + elu. Converted to it, GPT-2 (125M) has a WikiText-103
perplexity of 16.7, against 15.8 with softmax."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("hedgehog")
    if config.task.name == "mqar":
        options["heads"] = 2  # as the other models there
    config.model.pattern = ("hedgehog",)
    config.model.mixers = {"hedgehog": options}
    return config
