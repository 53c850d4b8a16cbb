"""Mamba (Gu and Dao, COLM 2024, arXiv 2312.00752), with negative eigenvalues (Grazzi et al., ICLR
2025, arXiv 2411.12537) where the task is state tracking.

    python -m experiments.train --config=experiments/configs/mamba.py:parity,smoke \
        --workdir=runs/mamba

parity,smoke: some minutes on 2 CPU cores. Published scaled accuracies at lengths beyond training,
eigenvalues in [-1, 1] and in [0, 1]: parity 1.000 and 0.000, modular arithmetic 0.241 and 0.095.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    if config.model.mlp != "none" and config.task.name != "state_tracking":
        # A block of attention and MLP has the parameters of two Mamba blocks.
        config.model.depth *= 2
    config.model.mlp = "none"
    if config.task.name == "text":
        config.model.tie_embeddings = True
    options = mixer_options("mamba")
    if config.task.name == "state_tracking":
        options["eigenvalue_range"] = (-1, 1)
    config.model.pattern = ("mamba",)
    config.model.mixers = {"mamba": options}
    return config
