"""One layer of linear self-attention on regression prompts (Zhang, Frei, Bartlett, JMLR 2024, arXiv
2306.09927).

    python -m experiments.train \
        --config=experiments/configs/linear_self_attention.py:icl_regression --workdir=runs/lsa

About a minute on 2 CPU cores. Expected squared error with 5 dimensions and 20 examples: 1.154, the
least that one layer can have, d (d + 1) / (N + d + 1)."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    if config.model.name != "linear_self_attention":
        raise ValueError(
            "linear_self_attention reads regression prompts: use the task"
            f" icl_regression; got {task!r}"
        )
    return config
