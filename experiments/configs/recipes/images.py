"""Classification of images, pixel by pixel."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def images(smoke: bool) -> ConfigDict:
    """Sequential digits; config.task.dataset names another image data set. Sizes of our own."""
    config = base(
        task=task_options("images"),
        model=language_model(width=128, depth=4),
        steps=5_000,
        batch_size=64,
        optimizer={},
        evaluation={"every_steps": 500, "examples": 10_000, "best_metric": "validation/accuracy"},
    )
    if smoke:
        shrink(config, steps=200, batch_size=32, width=32, lr=3e-3)
    return config
