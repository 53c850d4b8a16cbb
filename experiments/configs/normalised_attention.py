"""Normalised attention (Sieber et al., NeurIPS 2024, arXiv 2405.15731): linear attention with a
denominator that is learned.

    python -m experiments.train --config=experiments/configs/normalised_attention.py:mqar,smoke \
        --workdir=runs/normalised

mqar,smoke: half a minute on 2 CPU cores. The paper has figures for recall: accuracy rises with
state_size, and reaches softmax attention's at 512 tokens and 64 pairs from 128 on."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.pattern = ("normalised_attention",)
    config.model.mixers = {"normalised_attention": mixer_options("normalised_attention")}
    return config
