"""Softmax attention with rotary positions, the baseline (Vaswani et al., NeurIPS 2017, arXiv
1706.03762).

    python -m experiments.train --config=experiments/configs/transformer.py:mqar,smoke \
        --workdir=runs/transformer

mqar,smoke: half a minute on 2 CPU cores and too short for it, accuracy 0.18 (one seed): without a
convolution two layers must first learn to look one token back. Published accuracy on MQAR: 1.0 at
every width. Published scaled accuracies on state tracking at lengths beyond training: parity 0.022,
modular arithmetic 0.031."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    # Longer sequences than this lose their oldest tokens; 1024 is the longest of the other tasks.
    context_length = config.task.get_ref("sequence_length") if config.task.name == "text" else 1024
    options = mixer_options("transformer", context_length=context_length)
    if config.task.name == "mqar":
        options["heads"] = 1
    config.model.pattern = ("transformer",)
    config.model.mixers = {"transformer": options}
    return config
