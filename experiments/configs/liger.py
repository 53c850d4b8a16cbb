"""Liger (Lan et al., ICML 2025, arXiv 2503.01496): a run with softmax attention becomes linear.

    python -m experiments.train --config=experiments/configs/liger.py:runs/teacher \
        --workdir=runs/liger

The argument is the workdir of the run to convert, which `experiments.convert` can have brought in;
its task goes on. Only what LoRA adds to W_q, W_k and W_v is trained, as published: rank 8, AdamW,
rate 1e-3, 8 sequences a step, two passes over 50,000 (here as a number of steps). Published, for
Llama-3-8B: 72.4 on average over five tasks, of 73.0. With the name of a task, as in mqar,smoke, a
model of these layers is trained from nothing, which no paper has."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import available_recipes, recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.linearisation import fine_tuning, linearised, low_rank


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config: Any = recipe(run)
        config.model.pattern = ("liger",)
        config.model.mixers = {"liger": mixer_options("liger")}
        return config
    config = linearised(run, "liger")
    fine_tuning(config, lr=1e-3, steps=12_500, batch_size=8)
    low_rank(config, alpha=8.0, targets=("query", "key", "value"))
    return config
