"""DeltaNet (Yang et al., NeurIPS 2024, arXiv 2406.06484), with negative eigenvalues (Grazzi et al.,
ICLR 2025, arXiv 2411.12537) where the task is state tracking.

    python -m experiments.train --config=experiments/configs/delta_net.py:parity,smoke \
        --workdir=runs/delta_net

mqar,smoke: about a minute on 2 CPU cores, accuracy 1.00 (one seed). Published scaled accuracies at
lengths beyond training, eigenvalues in [-1, 1] and in [0, 1]: parity 1.000 and 0.017, modular
arithmetic 0.971 and 0.314."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    options = mixer_options("delta_net")
    if config.task.name == "state_tracking":
        options["eigenvalue_range"] = (-1, 1)
    if config.task.name == "mqar":
        options["heads"] = 2  # as in Zoology
    config.model.pattern = ("delta_net",)
    config.model.mixers = {"delta_net": options}
    return config
