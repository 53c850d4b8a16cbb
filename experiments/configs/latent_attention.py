"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv 2405.04434), alone: hybrids, as Kimi Linear
(arXiv 2510.26692) is one, name it in their pattern.

    python -m experiments.train --config=experiments/configs/latent_attention.py:mqar,smoke \
        --workdir=runs/latent_attention

mqar,smoke: minutes on 2 CPU cores."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("latent_attention", context_length=1024)
    config.model.pattern = ("latent_attention",)
    config.model.mixers = {"latent_attention": options}
    return config
