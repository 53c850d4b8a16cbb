"""Induction heads, after Mamba (Gu and Dao, COLM 2024, arXiv 2312.00752, section 4.1.2)."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def induction_heads(smoke: bool) -> ConfigDict:
    """25 times 8,192 steps of 8 fresh sequences; learning rates there 2e-4, 1e-3."""
    config = base(
        task=task_options("induction_heads", test_lengths=tuple(2**n for n in range(6, 15))),
        model=language_model(width=64, depth=2, mlp="none"),
        steps=204_800,
        batch_size=8,
        optimizer={"schedule": "constant", "weight_decay": 0.0},
        evaluation={"every_steps": 8_192, "examples": 512, "best_metric": "test/accuracy"},
    )
    if smoke:
        config.task.update({"length": 32, "test_lengths": (64, 128, 256)})
        shrink(config, steps=2_000, batch_size=64, width=32, lr=3e-3)
    return config
