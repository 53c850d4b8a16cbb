"""LSSL, linear state-space layers (Gu et al., NeurIPS 2021, arXiv 2110.13985).

    python -m experiments.train --config=experiments/configs/lssl.py:images,smoke \
        --workdir=runs/lssl

images,smoke: a minute on 2 CPU cores, to a test accuracy near 0.85. listops and lra_listops ..
lra_pathx, which the paper lacks, are S4's, with the layer normalisation of the paper. Published
test accuracies, trained and fixed transition: sequential MNIST 99.53 and 99.50, permuted MNIST
98.76 and 98.60, sequential CIFAR in colour 84.65 and 81.97."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import recipe
from experiments.configs.recipes.defaults import mixer_options
from experiments.configs.recipes.long_range_arena import as_classifier, is_arena


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    config.model.mlp = "none"  # the block has its own output map
    config.model.pattern = ("lssl",)
    options = {"state_size": config.model.width, "causal": not is_arena(task)}
    config.model.mixers = {"lssl": mixer_options("lssl", **options)}
    if is_arena(task):
        as_classifier(config, norm="layer", encoder="linear")
    config.optimizer.ssm_lr = min(1e-3, config.optimizer.lr)
    return config
