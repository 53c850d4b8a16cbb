"""Lightning Attention as in TNL (Qin et al., ICML 2024, arXiv 2405.17381).

    python -m experiments.train --config=experiments/configs/lightning.py:text,smoke \
        --workdir=runs/lightning

text,smoke: a few minutes on 2 CPU cores. The paper's ablation (385M parameters, 100k updates): loss
2.248 with rotated queries and keys in the first layer, 2.236 in all layers, 2.267 in none; 2.258 if
the decay ignores the layer."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("lightning", heads=max(1, config.model.width // 128))
    config.model.pattern = ("lightning",)
    config.model.mixers = {"lightning": options}
    return config
