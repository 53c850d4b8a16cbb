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


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    if config.model.mlp != "none" and config.task.name != "state_tracking":
        # A block of attention and MLP has the parameters of two Mamba blocks.
        config.model.depth *= 2
    config.model.mlp = "none"
    if config.task.name == "text":
        config.model.tie_embeddings = True
    options = {
        "expand": 2.0,
        "state_size": 16,
        "dt_rank": 0,
        "dt_min": 1e-3,
        "dt_max": 1e-1,
        "conv_width": 4,
        "eigenvalue_range": (-1, 1) if config.task.name == "state_tracking" else (0, 1),
    }
    config.model.pattern = ("mamba",)
    config.model.mixers = ConfigDict({"mamba": options})
    return config
