"""SLAB (Guo et al., ICML 2024, arXiv 2405.11582): simplified linear attention, and a norm that goes
from LayerNorm to BatchNorm while it trains.

    python -m experiments.train --config=experiments/configs/slab.py:digits,smoke \
        --workdir=runs/slab

imagenet is its DeiT-T (74.3 % top-1; with the norm alone 73.6), imagenet,small its DeiT-S (80.0;
80.2). On the others the norm goes over in the first two thirds of training. The pyramids of PVT,
Swin and CSWin are not here.

digits,smoke: 30 s of one CPU core, accuracy 0.96 (one seed)."""

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.images_of_size import image_recipe

# Width; heads are of 64.
SIZES = {"tiny": 192, "small": 384}


def get_config(task: str) -> ConfigDict:
    config, size = image_recipe("slab", task, SIZES)
    if size:
        config.model.width = SIZES[size]
    config.model.update(
        {
            "norm": "progressive_batch",
            "norm_eps": 1e-5,
            "norm_steps": 60_000 if size else 2 * config.steps // 3,
        }
    )
    side = {"digits": 8, "cifar10": 32, "cifar100": 32, "imagenet2012": 224}
    rows = side.get(config.task.dataset, 28) // config.model.patch
    options = mixer_options(
        "slab", heads=config.model.width // 64 if size else 2, position_grid=(rows, rows)
    )
    config.model.pattern = ("slab",)
    config.model.mixers = {"slab": options}
    return config
