"""LION (Liu et al., NeurIPS 2024).

    python -m experiments.train --config=experiments/configs/lion.py:shape_segmentation,smoke \
        --workdir=runs/lion
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.point_clouds import require_points


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    require_points(config, "lion", task)
    config.model.pattern = ("lion",)
    config.model.mixers = {"lion": mixer_options("lion")}
    return config
