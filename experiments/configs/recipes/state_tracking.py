"""Recipes of the task state_tracking, after Grazzi et al., "Unlocking State-Tracking in Linear RNNs
Through Negative Eigenvalues", ICLR 2025, arXiv 2411.12537.

Settings are the released ones, but float32 where they have bfloat16: states must be exact far out.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def parity(smoke: bool) -> ConfigDict:
    """Learning rates there: 1e-2, 1e-3, 5e-4, 1e-4."""
    config = _state_tracking("parity")
    config.steps = 20_000
    config.optimizer.update({"warmup_steps": 2_000, "weight_decay": 0.0})
    if smoke:
        # Asking at every token makes parity learnable in hundreds of steps.
        config.task.supervision = "every"
        shrink(config, steps=300, batch_size=64, width=32, lr=6e-3)
        config.model.mlp = "none"
    return config


def modular_arithmetic(smoke: bool) -> ConfigDict:
    """Three layers as in the paper, the rest as released."""
    config = _state_tracking("modular_arithmetic")
    config.model.depth = 3
    if smoke:
        config.task.train_max_length, config.task.test_max_length = 9, 31
        shrink(config, steps=300, batch_size=64, width=64, lr=3e-3)
    return config


def modular_arithmetic_brackets(smoke: bool) -> ConfigDict:
    """As modular_arithmetic."""
    config: Any = modular_arithmetic(smoke)
    config.task.kind = "modular_arithmetic_brackets"
    return config


def s5(smoke: bool) -> ConfigDict:
    """Products of five-point permutations: 100 epochs of 1.6 million sequences, here all different.

    The paper varies the depth, and states no schedule."""
    config = _state_tracking("s5")
    config.steps, config.batch_size = 312_500, 512
    config.model.depth = 3
    config.optimizer.update(
        {"lr": 1e-4, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.01}
    )
    config.eval.update({"every_steps": 5_000, "best_metric": "long/sequence_accuracy"})
    if smoke:
        config.task.update({"inputs": "swaps", "train_max_length": 8, "test_max_length": 32})
        shrink(config, steps=300, batch_size=64, width=64, lr=3e-3)
        config.eval.best_metric = "in_distribution/accuracy"
    return config


def _state_tracking(kind: str) -> Any:
    return base(
        task=task_options("state_tracking", kind=kind),
        model=language_model(width=128, depth=2),
        steps=100_000,
        batch_size=256,
        optimizer={"lr": 1e-3, "warmup_steps": 10_000, "end_lr": 1e-6},
        evaluation={"examples": 8_192, "best_metric": "long/scaled_accuracy"},
    )
