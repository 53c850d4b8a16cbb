"""Separation of two speakers from one channel at 8 kHz, to which a config adds a mixer.

Optimizer, clipping, batch and crops of `separation_large` are those of MossFormer2's released code
(Zhao et al., ICASSP 2024, arXiv 2312.11825): Adam at 1.5e-4, gradients clipped at 10, four
mixtures, one after the other, of 2 s. It halves the rate after five epochs without a better
validation loss and stops after ten; here the rate falls as a cosine over steps of our own. The
others are of sizes of our own."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base
from experiments.configs.recipes.defaults import task_options


def separation(smoke: bool) -> ConfigDict:
    """Generated voices, or with `--config.task.dataset=<folder>/` any WAV and FLAC files."""
    return _recipe(smoke, dataset="voices")


def separation_speech(smoke: bool) -> ConfigDict:
    """Sentences that espeak-ng speaks, which must be installed."""
    return _recipe(smoke, dataset="espeak")


def separation_large(smoke: bool) -> ConfigDict:
    """The published size and settings, for a folder of real speech with a subfolder for each
    speaker, at 8 kHz: ~/separation/speech, or `--config.task.dataset`."""
    config: Any = _recipe(smoke, dataset="~/separation/speech")
    if not smoke:
        config.task.seconds = 2.0
        config.batch_size, config.accumulate, config.steps = 4, 4, 200_000
        config.model.update({"width": 512, "depth": 24})
        config.optimizer.update({"lr": 1.5e-4, "clip_norm": 10.0, "warmup_steps": 0})
        config.eval.every_steps = config.checkpoint.every_steps = 5_000
    return config


def is_large(config: Any) -> bool:
    """Whether a recipe of separation has the published size."""
    return config.model.width == 512


def require_separation(config: Any, model: str, task: str) -> None:
    """Raises ValueError unless the recipe's model is a separator."""
    if config.model.name != "separator":
        raise ValueError(f"{model} separates sounds: use the task separation; got {task!r}")


def _recipe(smoke: bool, dataset: str) -> ConfigDict:
    config: Any = base(
        task=task_options("separation", dataset="voices" if smoke else dataset),
        model={
            "name": "separator",
            "width": 64,
            "depth": 4,
            "kernel": 16,
            "stride": 8,
            "norm": "layer",
            "norm_eps": 1e-5,
            "mlp": "gelu",
            "mlp_ratio": 4.0,
            "dropout": 0.0,
            "scan_layers": True,
            "remat": "none",
        },
        steps=500,
        batch_size=4,
        # Adam, without decay.
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "clip_norm": 5.0, "warmup_steps": 20},
        evaluation={
            "every_steps": 250,
            "examples": 200,
            "best_metric": "validation/si_sdri",
            "best_mode": "max",
        },
    )
    config.log_every_steps = 10
    config.checkpoint.every_steps = 250
    if smoke:
        config.task.update({"seconds": 0.5, "test_examples": 32})
        config.model.depth = 2
        config.steps = 200
        config.eval.every_steps = config.checkpoint.every_steps = 100
        config.optimizer.lr = 3e-3
    return config
