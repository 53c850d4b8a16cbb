"""Gated DeltaNet (Yang et al., ICLR 2025, arXiv 2412.06464), with negative eigenvalues (Grazzi et
al., ICLR 2025, arXiv 2411.12537) where the task is state tracking.

    python -m experiments.train --config=experiments/configs/gated_delta_net.py:text,smoke \
        --workdir=runs/gdn

text,smoke: a few minutes on 2 CPU cores. The paper's language models (1.3B parameters, 100B tokens
of FineWeb-Edu): WikiText perplexity 16.42, against 17.71 of DeltaNet, 16.56 of Mamba-2 and 18.53 of
a Transformer. mqar,smoke is too short for it (accuracy 0.18, one seed): with two heads the decays
start near 0.9 per token, which leaves little of a pair after 32."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("gated_delta_net")
    if config.task.name == "state_tracking":
        options["eigenvalue_range"] = (-1, 1)
    if config.task.name == "mqar":
        options["heads"] = 2  # as in Zoology
    config.model.pattern = ("gated_delta_net",)
    config.model.mixers = {"gated_delta_net": options}
    return config
