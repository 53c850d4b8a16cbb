"""LightNet (Qin et al., 2024, arXiv 2405.21022).

    python -m experiments.train --config=experiments/configs/lightnet.py:text,smoke \
        --workdir=runs/lightnet

text,smoke: a few minutes on 2 CPU cores. The report gives its results as on a level with Mamba in
language modelling; no number is compared here."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = {
        "heads": max(1, config.model.width // 128),
        "empty_sum": "zero",
        "gate_rank": min(128, config.model.width),
        "norm_eps": 1e-5,
    }
    config.model.pattern = ("lightnet",)
    config.model.mixers = ConfigDict({"lightnet": options})
    return config
