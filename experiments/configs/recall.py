"""Recall under a gated short convolution: the two-layer models of Based (Arora et al., ICML 2024,
arXiv 2402.18668).

    python -m experiments.train --config=experiments/configs/recall.py:delta_net,smoke \
        --workdir=runs/recall

The argument names the mixer of the second layer, a config file beside this one; the first layer is
BaseConv for all. The task is multi-query associative recall. delta_net,smoke: half a minute on 2
CPU cores."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options


def get_config(mixer: str) -> ConfigDict:
    """The config of `mixer` for mqar, "<mixer>" or "<mixer>,smoke", under BaseConv."""
    name, *variant = mixer.split(",")
    module = importlib.import_module(f"experiments.configs.{name}")
    config: Any = module.get_config(",".join(["mqar", *variant]))
    config.model.pattern = ("base_conv", *config.model.pattern)
    config.model.depth = len(config.model.pattern)
    config.model.mixers.base_conv = mixer_options("base_conv")
    return config
