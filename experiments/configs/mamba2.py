"""Mamba-2 (Dao and Gu, ICML 2024, arXiv 2405.21060).

    python -m experiments.train --config=experiments/configs/mamba2.py:mqar,smoke \
        --workdir=runs/mamba2

mqar,smoke: minutes on 2 CPU cores. The paper's figure on associative recall: far above Mamba at
equal width, growing with the state size. Gated DeltaNet's paper (arXiv 2412.06464) reports a
WikiText perplexity of 16.56 at 1.3B parameters and 100B tokens, against 17.92 of Mamba."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    if config.model.mlp != "none" and config.task.name != "state_tracking":
        # A block of attention and MLP has the parameters of two Mamba-2 blocks.
        config.model.depth *= 2
    config.model.mlp = "none"
    if config.task.name == "text":
        config.model.tie_embeddings = True
    options = mixer_options("mamba2", state_size=min(128, config.model.width))
    config.model.pattern = ("mamba2",)
    config.model.mixers = {"mamba2": options}
    return config
