"""CLEAR (Liu et al., NeurIPS 2025, arXiv 2412.16112): the attention of a run of DiT keeps to a disc
around each token.

    python -m experiments.train --config=experiments/configs/clear.py:runs/dit --workdir=runs/clear

The argument is the workdir of a run with softmax attention (`vit`). All of it is inherited, nothing
is new, and only attention is trained: on the task's own objective, what the run says (0.5) and what
the output map of each layer's attention reads (0.5). The paper's discs have radius 8, 16 or 32 on
64 x 64 tokens, and its models learn velocities (FLUX; FID to the images of the model itself at 1024
pixels: 15.5, 14.3 and 11.1, and 13.1, 13.7 and 8.9 with what the run teaches), with Prodigy; here
the radius is 2, for grids of 4 x 4 and 8 x 8, and rate and objective are the run's.
With the name of a task, as in diffusion_digits,smoke, the model is trained from nothing."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import available_recipes
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.diffusion import diffusion_recipe
from experiments.configs.recipes.distillation import ALL_BUT_ATTENTION, taught

RADIUS = 2.0


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config, _ = diffusion_recipe("clear", run, ())
        config.model.pattern = ("clear",)
        config.model.mixers = {"clear": mixer_options("clear", heads=2, radius=RADIUS)}
        return config
    config = taught(run, "clear")
    heads = config.model.teacher.mixers.vit.heads
    config.model.mixers = {"clear": mixer_options("clear", heads=heads, radius=RADIUS)}
    config.optimizer.frozen = (ALL_BUT_ATTENTION,)
    config.task.update({"distil_output": 0.5, "distil_features": 0.5, "features": "attention"})
    return config
