"""A signal delayed, after Gu et al., "How to Train Your HiPPO", ICLR 2023, arXiv 2206.12037."""

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, language_model, shrink
from experiments.configs.recipes.defaults import task_options


def delay(smoke: bool) -> ConfigDict:
    """What the signal was 64 tokens ago. Sizes of our own."""
    config = base(
        task=task_options("delay"),
        model=language_model(width=128, depth=2),
        steps=5_000,
        batch_size=64,
        optimizer={"warmup_steps": 500},
        evaluation={"best_metric": "test/accuracy"},
    )
    if smoke:
        shrink(config, steps=300, batch_size=32, width=32, lr=3e-3)
    return config
