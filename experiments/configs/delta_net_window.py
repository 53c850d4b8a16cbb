"""DeltaNet and sliding-window attention in turn (the hybrid of Yang et al., NeurIPS 2024, arXiv
2406.06484).

    python -m experiments.train --config=experiments/configs/delta_net_window.py:text,smoke \
        --workdir=runs/hybrid

text,smoke: a few minutes on 2 CPU cores. The paper's language models (340M parameters, 15B tokens):
WikiText perplexity 27.06, against 28.24 of DeltaNet alone. The window is Based's 64 (arXiv
2402.18668)."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import delta_net
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = delta_net.get_config(task)
    config.model.pattern = ("delta_net", "window_attention")
    config.model.mixers.window_attention = mixer_options("window_attention", window=64)
    return config
