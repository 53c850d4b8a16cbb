"""RetNet (Sun et al., 2023, arXiv 2307.08621).

    python -m experiments.train --config=experiments/configs/retnet.py:text,smoke \
        --workdir=runs/retnet

text,smoke: a few minutes on 2 CPU cores. GLA's paper (arXiv 2312.06635) reports a WikiText
perplexity of 32.33 at 340M parameters and 15B tokens, against 28.65 of GLA: decays that do not see
the data."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("retnet")
    # The mixer has 8 d^2 parameters and the MLP 4 d^2, where others have 4 and 8.
    config.model.mlp_ratio = 2.0
    if config.task.name == "mqar":
        options["heads"] = 2  # as the other models there
    config.model.pattern = ("retnet",)
    config.model.mixers = {"retnet": options}
    return config
