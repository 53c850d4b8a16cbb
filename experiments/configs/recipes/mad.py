"""Recipes of the synthetic tasks of MAD (Poli et al., ICML 2024, arXiv 2403.17844)."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def mad(smoke: bool) -> ConfigDict:
    """The base setting of the tasks: 200 epochs of 12,800 sequences in batches of 128.

    Learning rates there are 1e-4, 5e-4, 1e-3, weight decays 0 and 0.1. `task.kind` is one of the
    six tasks; compression needs `model.name = "compressor"`."""
    config = base(
        task=task_options("mad", kind="recall"),
        model=language_model(width=128, depth=2),
        steps=20_000,
        batch_size=128,
        optimizer={"lr": 5e-4, "end_lr": 1e-6},
        evaluation={"examples": 1_280, "best_metric": "test/accuracy"},
    )
    if smoke:
        # The predictable tokens alone: a model learns them in hundreds of steps instead of
        # thousands.
        config.task.update({"length": 64, "copied": 8, "targets_only": True})
        shrink(config, steps=600, batch_size=32, width=64, lr=3e-3)
    return config


def selective_copying(smoke: bool) -> ConfigDict:
    """Mamba (arXiv 2312.00752, section 4.1.1): 4,096 tokens, 400,000 steps of 64 fresh
    sequences."""
    config: Any = mad(smoke=False)
    config.task.update({"kind": "selective_copying", "length": 4_096 + 17, "vocabulary_size": 17})
    config.task.train_examples = -1
    config.steps, config.batch_size = 400_000, 64
    config.model.update({"width": 64, "mlp": "none"})
    config.optimizer.update({"lr": 1e-4, "schedule": "constant", "end_lr": 1e-4})
    if smoke:
        config.task.update({"length": 64 + 9, "vocabulary_size": 10, "copied": 8})
        shrink(config, steps=2_000, batch_size=64, width=32, lr=3e-3)
    return config
