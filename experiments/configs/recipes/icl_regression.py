"""In-context regression by one layer of linear self-attention (Zhang, Frei, Bartlett, JMLR 2024,
arXiv 2306.09927)."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base
from experiments.configs.recipes.defaults import task_options


def icl_regression(smoke: bool) -> ConfigDict:
    """Five dimensions and 20 examples. The least risk here is 1.1538."""
    config = base(
        task=task_options("icl_regression"),
        model={
            "name": "linear_self_attention",
            "depth": 1,
            "mask_query": False,
            "init": "gaussian",
            "init_scale": 0.1,
        },
        steps=1_000,
        batch_size=1_024,
        optimizer={"lr": 1e-2, "weight_decay": 0.0, "clip_norm": 0.0},
        evaluation={"examples": 65_536, "best_metric": "in_distribution/loss", "best_mode": "min"},
    )
    config.model.dimension = config.task.get_ref("dimension")
    if smoke:
        config.steps = 300
        config.eval.update({"every_steps": 300, "examples": 16_384})
        config.checkpoint.every_steps = 300
    return config
