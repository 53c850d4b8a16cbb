"""LightNet (Qin et al., 2024, arXiv 2405.21022).

    python -m experiments.train --config=experiments/configs/lightnet.py:text,smoke \
        --workdir=runs/lightnet

text,smoke: a few minutes on 2 CPU cores. The report gives its results as on a level with Mamba in
language modelling; no number is compared here."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    width = config.model.width
    options = mixer_options("lightnet", heads=max(1, width // 128), gate_rank=min(128, width))
    config.model.pattern = ("lightnet",)
    config.model.mixers = {"lightnet": options}
    return config
