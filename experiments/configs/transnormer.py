"""TransNormer T2 (Qin et al., EMNLP 2022, arXiv 2210.10340): DiagAttention in the lower half of the
layers, NormAttention in the upper half.

    python -m experiments.train --config=experiments/configs/transnormer.py:text,smoke \
        --workdir=runs/transnormer

text,smoke: a few minutes on 2 CPU cores. The paper's autoregressive WikiText-103: test perplexity
31.01, as softmax attention. listops and lra_listops .. lra_pathx are T2, too, and have the paper's
sizes, batch normalisation in front of a block, batch and learning rate, and read both sides of a
token, which are embedded, grey levels too; epochs, warm-up, weight decay and dropout are not known
to us: S4's, and none. Accuracy on the Long Range Arena: mean 64.80 (softmax attention 57.37),
Pathfinder 76.80 (65.26). Bidirectional, of 12 layers 0, 6 and 12 with DiagAttention: 4.23, 3.82,
4.75. T1, the paper's choice for other bidirectional models, has transnormer.feature_map="elu" and
diag_attention.attention="relu"."""

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

ARENA = {
    "batch_size": (128, 64, 64, 200, 128, 64),
    "model.depth": (4, 4, 4, 12, 4, 6),
    "model.width": (128, 128, 128, 128, 128, 64),
    "model.mlp_ratio": (4.0, 4.0, 4.0, 2.0, 1.0, 2.5),
    "optimizer.lr": (1e-4, 1e-3, 1e-3, 1e-3, 5e-4, 1e-4),
}
HEADS = {"heads": (8, 8, 4, 4, 8, 8)}


def get_config(task: str) -> ConfigDict:
    config: Any = recipe(task)
    mixers = ("diag_attention", "transnormer")
    causal = not is_arena(task)
    config.model.mixers = {name: mixer_options(name, causal=causal) for name in mixers}
    if not causal:
        as_classifier(config, norm="batch")
    heads = for_mixer("diag_attention", HEADS) | for_mixer("transnormer", HEADS)
    set_as_published(config, task, ARENA | heads)
    lower = config.model.depth // 2
    upper = config.model.depth - lower
    config.model.pattern = ("diag_attention",) * lower + ("transnormer",) * upper
    return config
