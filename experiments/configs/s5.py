"""S5, simplified state-space layers (Smith, Warrington, Linderman, ICLR 2023, arXiv 2208.04933).

    python -m experiments.train --config=experiments/configs/s5.py:images,smoke --workdir=runs/s5

images,smoke: half a minute on 2 CPU cores, to a test accuracy near 0.75. listops and lra_listops ..
lra_pathx are the paper's recipe; models/s5.py says what differs from its groups of learning rates.
Published test accuracies on the Long Range Arena: ListOps 62.15, text 89.31, retrieval 91.40, image
88.00, Pathfinder 95.33, Path-X 98.58, mean 87.46.

--config.model.mixers.s5.init=ptd makes it S5-PTD (Yu et al., ICLR 2024, arXiv 2310.01698): image
87.92, Path-X 98.52, mean 87.61. The settings of S5-PTD for each task are not known to us; these are
S5's, whose blocks for ListOps, of size 2, cannot be perturbed: --config.model.mixers.s5.blocks=1
with it. Those for image, of 128, take a minute to compute."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import (
    as_classifier,
    for_mixer,
    is_arena,
    set_as_published,
)

DROPOUT = (0.0, 0.1, 0.0, 0.1, 0.05, 0.0)
ARENA = {
    "batch_size": (50, 50, 32, 50, 64, 32),
    "epochs": (40, 35, 20, 250, 200, 75),
    "warmup_epochs": (1, 0, 1, 1, 1, 1),
    "model.depth": (8, 6, 6, 6, 6, 6),
    "model.width": (128, 256, 128, 512, 192, 128),
    "optimizer.lr": (3e-3, 4e-3, 2e-3, 4.5e-3, 4.5e-3, 1.8e-3),
    "optimizer.ssm_lr": (1e-3, 1e-3, 1e-3, 1e-3, 9e-4, 6e-4),
    "optimizer.weight_decay": (0.04, 0.07, 0.05, 0.07, 0.03, 0.06),
    "model.dropout": DROPOUT,
}
LAYERS = {
    "state_size": (16, 192, 256, 384, 256, 256),
    "blocks": (8, 12, 16, 3, 8, 16),
    "gate": ("half_glu2",) * 2 + ("half_glu1",) * 4,
    "clip_eigenvalues": (False, False, False, True, False, False),
    "dt_min": (1e-3,) * 5 + (1e-4,),
    "read_init": (
        *("lecun_normal", "lecun_normal", "trunc_standard_normal"),
        *("lecun_normal", "trunc_standard_normal", "complex_normal"),
    ),
    # The authors' BfastandCdecay, standard and BandCdecay, and their dt_global.
    "write_rate": ("full", "ssm", "ssm", "full", "ssm", "ssm_decay"),
    "step_rate": ("ssm", "full", "full", "ssm", "ssm", "ssm"),
    "dropout": DROPOUT,
}


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own gate
    config.model.pattern = ("s5",)
    options = {"state_size": config.model.width, "blocks": 4, "causal": not is_arena(task)}
    config.model.mixers = {"s5": mixer_options("s5", **options)}
    if is_arena(task):
        as_classifier(config, norm="batch", encoder="linear")
    # The paper's ratios lie between 1/5 and 1/2.
    config.optimizer.ssm_lr = 0.25 * config.optimizer.lr
    set_as_published(config, task, ARENA | for_mixer("s5", LAYERS))
    return config
