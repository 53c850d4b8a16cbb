"""KDA, Kimi Delta Attention (Kimi Team, 2025, arXiv 2510.26692).

    python -m experiments.train --config=experiments/configs/kda.py:mqar,smoke --workdir=runs/kda

mqar,smoke: minutes on 2 CPU cores. The paper's ablation (16 layers, 16 heads): validation
perplexity 5.65 with three layers of KDA to one of full attention, 5.77 of full attention alone."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("kda", heads=max(1, config.model.width // 128))
    if config.task.name == "mqar":
        options["heads"] = 2  # as in the paper's synthetic tasks
    config.model.pattern = ("kda",)
    config.model.mixers = {"kda": options}
    return config
