"""LoLCATs (Zhang et al., ICLR 2025, arXiv 2410.10254): a run with softmax attention becomes linear
in two stages.

    python -m experiments.train --config=experiments/configs/lolcats.py:runs/teacher \
        --workdir=runs/transfer
    python -m experiments.train --config=experiments/configs/lolcats.py:runs/transfer \
        --workdir=runs/lolcats

The argument is the workdir of a run. One with softmax attention gets feature maps, which learn its
attention (AdamW, rate 1e-2, 20M tokens; the loss is 1000 times the mean of transfer_error over the
layers). One that has learned them is adapted to its text (LoRA of rank 8 on all four projections,
rate 1e-4, 40M tokens). Steps are those of 8 sequences of 1024 tokens; the published rate falls
where validation stands still. Published, for Llama-3-8B: 74.2 on average over five tasks, of 73.1.
With the name of a task, as in mqar,smoke, a model of these layers is trained from nothing, which no
paper has."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import of_run
from experiments.configs.recipes.base import available_recipes, recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.linearisation import (
    ALL_BUT_FEATURES,
    fine_tuning,
    linearised,
    low_rank,
)


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config: Any = recipe(run)
        config.model.pattern = ("lolcats",)
        config.model.mixers = {"lolcats": mixer_options("lolcats")}
        return config
    source: Any = of_run.get_config(run)
    first = "lolcats" not in source.model.pattern
    config = linearised(run, "lolcats", stage="transfer" if first else "student")
    if first:
        fine_tuning(config, lr=1e-2, steps=2_441, batch_size=8)
        config.optimizer.frozen = ALL_BUT_FEATURES
    else:
        fine_tuning(config, lr=1e-4, steps=4_883, batch_size=8)
        low_rank(config, alpha=16.0, targets=("query", "key", "value", "output"))
    return config
