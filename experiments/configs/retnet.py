"""RetNet (Sun et al., 2023, arXiv 2307.08621).

    python -m experiments.train --config=experiments/configs/retnet.py:text,smoke \
        --workdir=runs/retnet

text,smoke: a few minutes on 2 CPU cores. GLA's paper (arXiv 2312.06635) reports a WikiText
perplexity of 32.33 at 340M parameters and 15B tokens, against 28.65 of GLA: decays that do not see
the data."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = {"heads": 4, "expand_v": 2.0, "rope_base": 10_000.0, "norm_eps": 1e-5}
    if config.task.name == "mqar":
        options.update(heads=2)  # as the other models there
    # The mixer has 8 d^2 parameters and the MLP 4 d^2, where others have 4 and 8.
    config.model.mlp_ratio = 2.0
    config.model.pattern = ("retnet",)
    config.model.mixers = ConfigDict({"retnet": options})
    return config
