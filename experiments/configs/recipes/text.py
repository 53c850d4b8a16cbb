"""Language modelling."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def text(smoke: bool) -> ConfigDict:
    """Bytes of the Python standard library. Sizes of our own, for one accelerator; the usual
    optimiser settings."""
    config = base(
        task=task_options("text"),
        model=language_model(width=512, depth=8),
        steps=10_000,
        batch_size=64,
        optimizer={"warmup_steps": 500, "end_lr": 1e-4, "b2": 0.95},
        evaluation={"examples": 256, "best_metric": "validation/bits_per_byte", "best_mode": "min"},
    )
    if smoke:
        config.task.sequence_length = 256
        shrink(config, steps=150, batch_size=8, width=64, lr=3e-3)
        config.eval.examples = 64
    return config
