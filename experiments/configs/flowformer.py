"""Flowformer (Wu et al., ICML 2022, arXiv 2202.06258).

    python -m experiments.train --config=experiments/configs/flowformer.py:mqar,smoke \
        --workdir=runs/flowformer

mqar,smoke: two minutes on 2 CPU cores, accuracy 0.16 (one seed).

Causal where a next token is asked for, and not where a whole sequence is classified: images,
listops and lra_listops .. lra_pathx; nor where an image is: digits .. imagenet, which is the
pyramid of the paper. Perplexity of WikiText-103 in the paper: 30.8 (softmax 33.0, linear attention
38.4; without competition 31.2, without allocation 32.2). Long Range Arena, in the order ListOps,
text, retrieval, image, Pathfinder, mean: 38.70, 64.29, 62.24, 43.20, 73.95, 56.48.

listops and lra_listops .. lra_pathfinder have the sizes and the optimiser of the released code;
Path-X, which the paper lacks, S4's. Departures: the attention is that of the vision code (sigmoid,
clip 1, softmax over sources, biases); no positions; the last token answers, not one added for it;
retrieval reads both papers as one sequence; from its peak to its end the learning rate of ListOps
and text falls in a straight line, not as the inverse square root of the step."""

import math
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import for_mixer, set_as_published

CLASSIFICATION = (
    *("listops", "text_classification", "retrieval", "images", "pathfinder"),
    "image_classification",
)
# The released schedule is constant * min(1, n / warmup) / sqrt(max(n, warmup)) at step n.
ARENA = {
    "batch_size": (32, 32, 32, 256, 512, None),
    "epochs": (None, None, None, 200, 200, None),
    "warmup_epochs": (None, None, None, 1.0, 1.0, None),
    "steps": (5_000, 20_000, 5_000, None, None, None),
    "model.depth": (1, 1, 4, 1, 1, None),
    "model.width": (512, 256, 128, 128, 256, None),
    "model.mlp": "gelu",
    "model.mlp_ratio": (2.0, 4.0, 4.0, 1.0, 1.0, None),
    "model.norm": "layer",
    "model.embedding_std": 1.0,
    "model.dropout": (0.1, 0.1, 0.1, 0.3, 0.2, 0.1),
    "model.embedding_dropout": (0.1, 0.1, 0.1, 0.3, 0.2, 0.1),
    "optimizer.schedule": ("linear", "linear", "linear", None, None, None),
    "optimizer.warmup_steps": (1_000, 8_000, 5_000, None, None, None),
    "optimizer.lr": (
        0.005 / math.sqrt(1_000),
        0.005 / math.sqrt(8_000),
        0.05 * 5_000 / 8_000 / math.sqrt(8_000),
        5e-4,
        1e-4,
        None,
    ),
    "optimizer.end_lr": (0.005 / math.sqrt(5_000), 0.005 / math.sqrt(20_000), *(None,) * 4),
    "optimizer.weight_decay": (0.1, 0.1, 0.1, 0.0, 0.0, None),
}
LAYERS = {"heads": (2, 4, 4, 4, 8, None), "expand": (1.0, 1.0, 1.0, 0.5, 0.5, None)}


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    causal = config.task.name not in CLASSIFICATION
    # Of the authors' language model and vision code.
    options = mixer_options("flowformer", causal=causal, clip=5.0 if causal else 1.0)
    if config.task.get("dataset") == "imagenet2012":
        _set_pyramid(config)
        options["heads"] = 12
    if config.task.name == "mqar":
        options["heads"] = 2  # as the other models there
    config.model.pattern = ("flowformer",)
    config.model.mixers = {"flowformer": options}
    set_as_published(config, task, ARENA | for_mixer("flowformer", LAYERS))
    return config


def _set_pyramid(config: Any) -> None:
    """The vision model of the paper, 80.6 % top-1 at 224 x 224. Its 19 layers have the 41 M
    parameters that are published; the mergings, the positions and the head are 2.7 M more."""
    config.optimizer.lr = 1e-3  # 5e-4 for every 512 images
    config.model.update(
        {
            "width": 96,
            "depth": 3,
            "patch": 4,
            "mlp_scale": 1e-5,
            "drop_path": 0.2,
            "stages": (
                {"width": 192, "depth": 3},
                {"width": 384, "depth": 10},
                {"width": 768, "depth": 3},
            ),
        }
    )
