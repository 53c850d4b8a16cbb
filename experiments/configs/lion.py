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
    smoke = config.model.width < 64
    options = mixer_options("lion", operator="mamba", state_size=4 if smoke else 16)
    config.model.pattern, config.model.mixers = ("lion",), {"lion": options}
    # Around the paper's Mamba: x + norm(f(x)), and no MLP.
    config.model.update({"mlp": "none", "branch_norm": True, "drop_path": 0.0 if smoke else 0.2})
    return config
