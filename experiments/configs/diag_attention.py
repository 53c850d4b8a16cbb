"""DiagAttention in all layers: one end of TransNormer's ablation (Qin et al., EMNLP 2022, arXiv
2210.10340).

    python -m experiments.train --config=experiments/configs/diag_attention.py:text,smoke \
        --workdir=runs/diag_attention

text,smoke: a few minutes on 2 CPU cores. Bidirectional, of 12 layers 6 and 12 with DiagAttention:
perplexity 3.82 and 4.75 in the paper. Nothing crosses the border between two blocks."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.pattern = ("diag_attention",)
    config.model.mixers = {"diag_attention": mixer_options("diag_attention")}
    return config
