"""GLA, gated linear attention (Yang et al., ICML 2024, arXiv 2312.06635).

    python -m experiments.train --config=experiments/configs/gla.py:text,smoke --workdir=runs/gla

mqar,smoke: about a minute on 2 CPU cores, accuracy 0.99 (one seed). The paper's language
models (340M parameters, 15B tokens of SlimPajama): WikiText perplexity 28.65, against 28.39 of a
Transformer and 32.33 of RetNet."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("gla")
    if config.task.name == "mqar":
        # Heads as in Zoology; convolutions as the other models have there.
        options.update(heads=2, conv_width=4)
    config.model.pattern = ("gla",)
    config.model.mixers = {"gla": options}
    return config
