"""LRU, the linear recurrent unit (Orvieto et al., ICML 2023, arXiv 2303.06349).

    python -m experiments.train --config=experiments/configs/lru.py:images,smoke --workdir=runs/lru

images,smoke: half a minute on 2 CPU cores, to a test accuracy near 0.9. Published test accuracies
on the Long Range Arena: sequential CIFAR in colour 89.0, ListOps 60.2, text 89.4, retrieval 89.9,
Pathfinder 95.1, Path-X 94.2. Of listops and lra_listops .. lra_pathx the depth, 6, the batch
normalisation in front of a block and the largest phase for Path-X are the paper's. The rest is not
known to us: both directions, in the form of S5's, and S4's settings, with as many states as the
model is wide."""

import math
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import (
    S4_BLOCKS,
    as_classifier,
    for_mixer,
    is_arena,
    set_as_published,
)


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own GLU
    ring = {"r_min": 0.9, "r_max": 0.999}
    options = mixer_options("lru", state_size=config.model.width, causal=not is_arena(task), **ring)
    if is_arena(task):
        as_classifier(config, norm="batch", encoder="linear")
    config.model.pattern = ("lru",)
    config.model.mixers = {"lru": options}
    phases = (2 * math.pi,) * 5 + (math.pi / 10,)
    dropout = S4_BLOCKS["model.dropout"]
    layers = {"max_phase": phases, "dropout": dropout}
    set_as_published(config, task, {"model.dropout": dropout} | for_mixer("lru", layers))
    # The paper: a smaller one, without decay.
    config.optimizer.ssm_lr = 0.25 * config.optimizer.lr
    return config
