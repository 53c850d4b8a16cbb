"""LinFusion (Liu et al., 2024, arXiv 2409.02097): a run of DiT gets normalised linear attention.

    python -m experiments.train --config=experiments/configs/linfusion.py:runs/dit \
        --workdir=runs/linfusion

The argument is the workdir of a run with softmax attention (`vit`). All of it is inherited, and
only attention is trained, on the task's own objective, the noise that the run predicts (0.5) and
what its attention returns in each layer (0.5); AdamW, 1e-4 in the paper and the run's own rate
here, for sizes as small. The paper replaces the attention of U-Nets; its numbers are of those.
Of the run of dit.py:diffusion_digits,smoke: error of the noise 0.097 on validation after 500 steps,
0.098 of the teacher (one seed).
With the name of a task, as in diffusion_digits,smoke, the model is trained from nothing."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import available_recipes
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.diffusion import diffusion_recipe
from experiments.configs.recipes.distillation import ALL_BUT_ATTENTION, taught


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config, _ = diffusion_recipe("linfusion", run, ())
        config.model.pattern = ("linfusion",)
        config.model.mixers = {"linfusion": mixer_options("linfusion", heads=2)}
        return config
    config = taught(run, "linfusion")
    heads = config.model.teacher.mixers.vit.heads
    config.model.mixers = {"linfusion": mixer_options("linfusion", heads=heads)}
    config.optimizer.frozen = (ALL_BUT_ATTENTION,)
    config.task.update({"distil_output": 0.5, "distil_features": 0.5})
    return config
