"""ViG (Liao et al., AAAI 2025, arXiv 2405.18425).

    python -m experiments.train --config=experiments/configs/vig.py:digits,smoke \
        --workdir=runs/vig

imagenet and imagenet,tiny .. imagenet,hierarchical_base are the published models. Top-1 at 224 x
224: tiny 77.2, small 81.7, base 82.6; hierarchical 82.8, 83.8, 84.2. Learning rates are those of
the released code for a batch of 1,024, twice what is listed for 512."""

import math
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.images_of_size import image_recipe

ISOTROPIC: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "drop_path": 0.0, "lr": 2e-3, "weight_decay": 0.05},
    "small": {"width": 384, "drop_path": 0.2, "lr": 1e-3, "weight_decay": 0.1},
    "base": {"width": 768, "drop_path": 0.5, "lr": 2e-3, "weight_decay": 0.05},
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "hierarchical_tiny": {"width": 96, "third": 5, "drop_path": 0.2, "lr": 1.6e-3},
    "hierarchical_small": {"width": 96, "third": 17, "drop_path": 0.3, "lr": 2e-3},
    "hierarchical_base": {"width": 128, "third": 17, "drop_path": 0.6, "lr": 2e-3},
}


def get_config(task: str) -> ConfigDict:
    config, size = image_recipe("vig", task, (*ISOTROPIC, *HIERARCHICAL))
    config.model.update({"mlp": "swiglu", "norm": "rms"})
    options = mixer_options("vig", size_per_head=config.model.width // 2)
    if size:
        options = _published(config, size)
    config.model.pattern = ("vig",)
    config.model.mixers = {"vig": options}
    return config


def _published(config: Any, size: str) -> dict[str, Any]:
    """Sets the model and the training of a size and returns the options of its mixer."""
    values = (ISOTROPIC | HIERARCHICAL)[size]
    config.ema_decay, config.eval.averaged = 0.9999, True
    config.optimizer.update(
        {
            "lr": values["lr"],
            "weight_decay": values.get("weight_decay", 0.05),
            "end_lr": 1e-5,
            "clip_norm": 5.0,
            "warmup_steps": config.steps // 15,  # 20 epochs of 300
        }
    )
    width = values["width"]
    config.model.update({"width": width, "drop_path": values["drop_path"]})
    if size in ISOTROPIC:
        config.model.update({"stem": "overlapping", "mlp_width": _inner(width, 256)})
        silu = {"convolution_activation": "silu", "output_activation": "silu"}
        return mixer_options("vig", **(silu if size == "tiny" else {}))
    config.model.update(
        {
            "depth": 2,
            "stem": "halving",
            "patch": 4,
            "positions": "none",
            "mlp_width": _inner(width, 32),
            "norm": "layer",
            "stages": tuple(
                {
                    "width": width << stage,
                    "depth": depth,
                    "mlp_width": _inner(width << stage, 32),
                    "merge": "halving",
                }
                for stage, depth in ((1, 2), (2, values["third"]), (3, 2))
            ),
        }
    )
    return mixer_options("vig", size_per_head=32)


def _inner(width: int, multiple: int) -> int:
    return multiple * math.ceil(8 * width / 3 / multiple)
