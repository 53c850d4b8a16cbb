"""Images and videos of a class out of noise, as DiT learns them (Peebles and Xie, ICCV 2023, arXiv
2212.09748): AdamW without decay, an average of the weights. Sizes and rates are of our own, but for
ImageNet's. `--config.task.objective=flow` learns velocities instead."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, shrink
from experiments.configs.recipes.defaults import task_options
from experiments.configs.recipes.images_of_size import sized_recipe


def diffusion_digits(smoke: bool) -> ConfigDict:
    """1,257 digits of 8 x 8 pixels, 16 tokens."""
    config = _diffusion("digits", steps=8_000)
    return _smoke(config) if smoke else config


def diffusion_mnist_subset(smoke: bool) -> ConfigDict:
    """3,500 images of MNIST, made 16 x 16, 64 tokens."""
    config = _diffusion("mnist_subset", steps=8_000, size=16)
    return _smoke(config) if smoke else config


def diffusion_fashion_mnist(smoke: bool) -> ConfigDict:
    """54,000 images of clothes, made 16 x 16, 64 tokens."""
    config = _diffusion("fashion_mnist", steps=8_000, size=16, flip=True)
    return _smoke(config) if smoke else config


def diffusion_moving_digits(smoke: bool) -> ConfigDict:
    """Digits of 8 x 8 pixels that bounce about in 8 frames of 16 x 16: 512 tokens, of the smoke
    size 128."""
    config = _diffusion("digits", steps=8_000, batch_size=16, task="video_generation")
    config.model.patch_frames = 1
    if not smoke:
        return config
    config.model.patch = 4
    config = _smoke(config)
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1_000, 16, 50
    config.eval.every_steps = config.checkpoint.every_steps = 250
    return config


def diffusion_imagenet(smoke: bool) -> ConfigDict:
    """ImageNet-1K, pixels of 64 x 64 in place of latents of 32 x 32: 256 tokens, too."""
    size: dict[str, Any] = {"size": 64, "test_split": "validation", "flip": True}
    config = _diffusion("imagenet2012", steps=400_000, patch=4, batch_size=256, **size)
    config.optimizer.update({"lr": 1e-4, "schedule": "constant", "warmup_steps": 0})
    config.ema_decay = 0.9999
    config.eval.every_steps = config.checkpoint.every_steps = 10_000
    return _smoke(config) if smoke else config


def diffusion_recipe(model: str, argument: str, sizes: Collection[str]) -> tuple[Any, str]:
    """`sized_recipe` of what makes images, whose sizes are for "diffusion_imagenet"."""
    return sized_recipe(
        *(model, argument, sizes),
        large="diffusion_imagenet",
        network="diffusion_transformer",
        expected="makes images: use a task of image_generation, such as diffusion_digits",
    )


def _diffusion(
    dataset: str,
    *,
    steps: int,
    patch: int = 2,
    batch_size: int = 64,
    task: str = "image_generation",
    **options: Any,
) -> Any:
    config = base(
        task=task_options(task, dataset=dataset, **options),
        model={
            "name": "diffusion_transformer",
            "width": 96,
            "depth": 4,
            "patch": patch,
            "mlp": "gelu_tanh",
            "mlp_ratio": 4.0,
            "mlp_width": 0,
            "mlp_init": "xavier",
            "norm": "layer_plain",
            "norm_eps": 1e-6,
            "drop_path": 0.0,
            "scan_layers": True,
            "remat": "none",
        },
        steps=steps,
        batch_size=batch_size,
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "warmup_steps": steps // 20},
        evaluation={
            "examples": 1_000,
            "averaged": True,
            "best_metric": "validation/mse",
            "best_mode": "min",
        },
    )
    config.ema_decay = 0.999
    config.eval.every_steps = config.checkpoint.every_steps = max(steps // 8, 1)
    return config


def _smoke(config: Any) -> Any:
    shrink(config, steps=2_000, batch_size=64, width=64, lr=2e-3)
    config.ema_decay = 0.99
    config.eval.examples = 200
    return config
