"""Recall under a gated short convolution: the two-layer models of Based (Arora et al., ICML 2024,
arXiv 2402.18668).

    python -m experiments.train --config=experiments/configs/recall.py:delta_net,smoke \
        --workdir=runs/recall

The argument names the mixer of the second layer, a config file beside this one; the first layer is
BaseConv for all. The task is multi-query associative recall. delta_net,smoke: half a minute on 2
CPU cores."""

import importlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options

NO_MIXERS = {"recall", "linear_self_attention"}


def get_config(mixer: str) -> ConfigDict:
    """The config of `mixer` for mqar, "<mixer>" or "<mixer>,smoke", under BaseConv. Raises
    ValueError, naming the mixers, for one that has no config."""
    name, *variant = mixer.split(",")
    mixers = sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - NO_MIXERS)
    if name not in mixers:
        raise ValueError(
            "the argument of recall.py is <mixer> or <mixer>,smoke with a mixer of"
            f" {', '.join(mixers)}; got {mixer!r}"
        )
    module = importlib.import_module(f"experiments.configs.{name}")
    config: Any = module.get_config(",".join(["mqar", *variant]))
    config.model.pattern = ("base_conv", *config.model.pattern)
    config.model.depth = len(config.model.pattern)
    config.model.mixers.base_conv = mixer_options("base_conv")
    return config
