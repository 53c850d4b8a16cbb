"""Kronecker attention (Alman and Song, ICLR 2024, arXiv 2310.04064): a token attends to pairs of
tokens, by a polynomial in linear time.

    python -m experiments.train \
        --config=experiments/configs/kronecker_attention.py:mqar,smoke --workdir=runs/kronecker

mqar,smoke: a few minutes on 2 CPU cores. The paper trains nothing. The exact form, in the time of
T^3, has kronecker_attention.form="exact" and causal=False."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.pattern = ("kronecker_attention",)
    config.model.mixers = {"kronecker_attention": mixer_options("kronecker_attention")}
    return config
