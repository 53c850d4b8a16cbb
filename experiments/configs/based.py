"""Based (Arora et al., ICML 2024, arXiv 2402.18668): Taylor linear attention and sliding windows of
64 in turn.

    python -m experiments.train --config=experiments/configs/based.py:mqar,smoke \
        --workdir=runs/based

mqar,smoke: minutes on 2 CPU cores. The paper's ablation (362M parameters, 10B tokens of the Pile):
perplexity 8.65, or 8.91 without windows, 8.74 without the short convolutions, which are left out
here."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    based = mixer_options("based")
    window = mixer_options("window_attention", window=64)
    if config.task.name == "mqar":
        based.update(heads=2)  # as the other models there
        # Shorter than the distances that are asked for.
        window.update(heads=2, window=16)
    config.model.pattern = ("based", "window_attention")
    config.model.mixers = {"based": based, "window_attention": window}
    return config
