"""HGRN2 (Qin et al., COLM 2024, arXiv 2404.07904).

    python -m experiments.train --config=experiments/configs/hgrn2.py:text,smoke \
        --workdir=runs/hgrn2

text,smoke: a few minutes on 2 CPU cores. Gated DeltaNet's paper (arXiv 2412.06464) reports a
WikiText perplexity of 19.10 at 1.3B parameters and 100B tokens, against 19.08 of RetNet and 16.42
of Gated DeltaNet."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("hgrn2", heads=max(1, config.model.width // 128))
    config.model.pattern = ("hgrn2",)
    config.model.mixers = {"hgrn2": options}
    return config
