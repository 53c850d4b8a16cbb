"""LION (Liu et al., NeurIPS 2024).

    python -m experiments.train --config=experiments/configs/lion.py:shape_segmentation,smoke \
        --workdir=runs/lion

Smoke sizes take about 150 seconds of processor time, of which compilation is a quarter. One seed,
150 steps: accuracy of test clouds 0.65 (shape_classification), of 0.41 without operators
(--config.model.orders="()"), whose convolutions reach 0.88 after 600 steps; of test voxels 0.47,
mean IoU 0.30 (shape_segmentation)."""

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
