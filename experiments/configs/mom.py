"""MoM, mixture of memories (Du et al., ICLR 2026, arXiv 2502.13685).

    python -m experiments.train --config=experiments/configs/mom.py:text,smoke --workdir=runs/mom
    python -m experiments.train --config=experiments/configs/mom.py:text --workdir=runs/mom_gla \
      --config.model.mixers.mom.rule=gla --config.model.mixers.mom.conv_width=0

text,smoke: minutes on 2 CPU cores. The paper's language models (380M parameters, 15B tokens of
SlimPajama): average over six recall-intensive tasks 28.16, against 24.78 of Gated DeltaNet and
31.70 of a Transformer; WikiText perplexity 25.86, 26.47 and 26.88. """

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    # Of rule="gated_delta_net", the default; the layer with "gla" is published without.
    options = mixer_options("mom", conv_width=4)
    if config.task.name == "mqar":
        options["heads"] = 2  # as the other models have there
        options["execution"] = "padded"  # faster for short sequences, see models/mom
    config.model.pattern = ("mom",)
    config.model.mixers = {"mom": options}
    return config
