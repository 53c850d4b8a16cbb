"""LiT (ICCV 2025): a run of DiT gets linear attention, and learns from what it was.

    python -m experiments.train --config=experiments/configs/lit.py:runs/dit --workdir=runs/lit

The argument is the workdir of a run with softmax attention (`vit`). All but its attention is
inherited; the run itself is the teacher, whose noise (0.5) and variance (0.05) are learned beside
the task's own. Heads are a third of the teacher's, at least one, as 2 of 6 in the smallest
published model. Published, for DiT-S/2 after 400,000 steps (FID on ImageNet, the lower the better):
68.40 with softmax attention, 63.24 with LiT from nothing, 54.80 with what is inherited, 50.79 with
both teachers' terms.
Of the run of dit.py:diffusion_digits,smoke: error of the noise 0.092 on validation after 500 steps,
0.098 of the teacher, which had 2,000 (one seed).
With the name of a task, as in diffusion_digits,smoke, the model is trained from nothing."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import available_recipes
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.diffusion import diffusion_recipe
from experiments.configs.recipes.distillation import taught

# Width, depth and heads of DiT's sizes.
SIZES = {
    "small": (384, 12, 2),
    "base": (768, 12, 3),
    "large": (1024, 24, 4),
    "xlarge": (1152, 28, 4),
}


def get_config(run: str) -> ConfigDict:
    if run.partition(",")[0] in available_recipes():
        config, size = diffusion_recipe("lit", run, SIZES)
        heads = 2
        if size:
            config.model.width, config.model.depth, heads = SIZES[size]
        config.model.pattern = ("lit",)
        config.model.mixers = {"lit": mixer_options("lit", heads=heads)}
        return config
    config = taught(run, "lit")
    heads: Any = max(config.model.teacher.mixers.vit.heads // 3, 1)
    config.model.mixers = {"lit": mixer_options("lit", heads=heads)}
    config.init_except = (r"stack/.*/mixer/.*",)
    config.task.update({"distil_output": 0.5, "distil_variance": 0.05})
    if config.task.objective == "flow" or not config.task.learned_variance:
        config.task.distil_variance = 0.0
    return config
