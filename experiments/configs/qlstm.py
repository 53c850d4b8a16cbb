"""qLSTM (Sieber et al., NeurIPS 2024, arXiv 2405.15731); its reversed form with
--config.model.mixers.qlstm.forget=reversed.

    python -m experiments.train --config=experiments/configs/qlstm.py:mqar,smoke \
        --workdir=runs/qlstm

mqar,smoke: half a minute on 2 CPU cores. The paper has figures for recall: the reversed form
recalls more, both less than models with more than one state per channel."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"
    config.model.pattern = ("qlstm",)
    config.model.mixers = {"qlstm": mixer_options("qlstm")}
    return config
