"""Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) as in DeiT (Touvron et al.,
ICML 2021, arXiv 2012.12877): the softmax baseline of the image models.

    python -m experiments.train --config=experiments/configs/vit.py:digits,smoke \
        --workdir=runs/vit

digits,smoke: 10 s of one CPU core, accuracy 0.92 (one seed).

imagenet is DeiT-T (5.7 M parameters, 72.2 % top-1 at 224 x 224); imagenet,small is DeiT-S (22.1 M,
79.8)."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.images_of_size import image_recipe

# Width; heads are of 64.
SIZES = {"tiny": 192, "small": 384}


def get_config(task: str) -> ConfigDict:
    config, size = image_recipe("vit", task, SIZES)
    if size:
        config.model.update({"width": SIZES[size], "pooling": "class_token"})
    heads: Any = config.model.width // 64 if size else 2
    config.model.pattern = ("vit",)
    config.model.mixers = {"vit": mixer_options("vit", heads=heads)}
    return config
