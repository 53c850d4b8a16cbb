"""S4, structured state spaces (Gu, Goel, Re, ICLR 2022, arXiv 2111.00396).

    python -m experiments.train --config=experiments/configs/s4.py:images,smoke --workdir=runs/s4

images,smoke: a minute on 2 CPU cores, to a test accuracy near 0.77. listops and lra_listops ..
lra_pathx are the authors' later recipe: both directions, batch normalisation, before or behind a
block, and two encoders for retrieval; step sizes learn as slowly as Lambda. Published accuracies on
the Long Range Arena: ListOps 58.35, text 76.02, retrieval 87.09, image 87.26, Pathfinder 86.05,
Path-X 88.10, mean 80.48; with the later recipe (arXiv 2206.12037) 59.60, 86.82, 90.90, 88.65,
94.20, 96.35, mean 86.09; with init="fout" 57.88, 86.34, 89.66, 89.07, 94.46, Path-X fails, mean
77.90; with init="legs_fout" 60.45, 86.78, 90.30, 89.00, 94.44, Path-X fails, mean 78.50."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import (
    S4_BLOCKS,
    S4_LAYERS,
    as_classifier,
    for_mixer,
    is_arena,
    sequence_length,
    set_as_published,
)


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own GLU
    # Sequences up to this length are convolutions; the recurrence serves longer ones.
    kernel_length: Any = 64 if task.startswith("images") else 1024
    if is_arena(task):
        as_classifier(config, norm="batch", encoder="linear")
        kernel_length = sequence_length(config.task)
    state_size = 64 if config.model.width >= 128 else 16
    options = mixer_options(
        "s4", state_size=state_size, kernel_length=kernel_length, causal=not is_arena(task)
    )
    config.model.pattern = ("s4",)
    config.model.mixers = {"s4": options}
    dropout = {"dropout": S4_BLOCKS["model.dropout"]}
    set_as_published(config, task, S4_BLOCKS | for_mixer("s4", S4_LAYERS | dropout))
    config.optimizer.ssm_lr = min(1e-3, config.optimizer.lr)
    return config
