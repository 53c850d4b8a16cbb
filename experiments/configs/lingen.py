"""LinGen (Wang et al., CVPR 2025): videos out of noise by walks over all tokens in four orders, and
windows.

    python -m experiments.train --workdir=runs/lingen \
        --config=experiments/configs/lingen.py:diffusion_moving_digits,smoke
    python -m experiments.sample --workdir=runs/lingen --count=16 --steps=100

The second writes film.gif, and the frames of the first videos as grid.png. The paper's model has 4
billion parameters and reads latents of 68 seconds at 512 pixels; against attention of the same size
it has 15 times fewer operations there. Sizes here are of our own. dit.py trains softmax attention
on the same videos."""

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.diffusion import diffusion_recipe


def get_config(task: str) -> ConfigDict:
    config, _ = diffusion_recipe("lingen", task, ())
    config.model.pattern = ("lingen",)
    config.model.mixers = {
        "lingen": mixer_options("lingen", windows=(4, 4, 4), state_size=16, heads=2)
    }
    return config
