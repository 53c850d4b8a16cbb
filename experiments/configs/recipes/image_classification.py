"""Classification of images. Each recipe is that of DeiT (Touvron et al., ICML 2021, arXiv
2012.12877), from which those of the papers here follow, or a proxy of our own that is like it; a
model's config file has what its paper does otherwise."""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs.recipes.base import base, shrink
from experiments.configs.recipes.defaults import task_options


def digits(smoke: bool) -> ConfigDict:
    """1,257 digits of 8 x 8 pixels, 16 tokens. Sizes of our own."""
    task = task_options("image_classification")
    config = _images(task, _model(width=64, depth=4, patch=2), epochs=60, batch_size=32)
    return _smoke(config) if smoke else config


def mnist_subset(smoke: bool) -> ConfigDict:
    """3,500 images of MNIST, 49 tokens. Sizes of our own."""
    task = task_options("image_classification", dataset="mnist_subset", crop="padded", padding=2)
    config = _images(
        task, _model(width=64, depth=4, patch=4), epochs=60, batch_size=64, train=3_500
    )
    return _smoke(config) if smoke else config


def fashion_mnist(smoke: bool) -> ConfigDict:
    """54,000 images of clothes, 49 tokens. Sizes of our own."""
    task = task_options(
        "image_classification", dataset="fashion_mnist", crop="padded", padding=2, flip=True
    )
    model = _model(width=64, depth=4, patch=4)
    config = _images(task, model, epochs=60, batch_size=128, train=54_000)
    return _smoke(config) if smoke else config


def cifar10(smoke: bool) -> ConfigDict:
    """45,000 images of 32 x 32, 64 tokens; augmented as ImageNet is. Sizes of our own."""
    return _cifar("cifar10", smoke)


def cifar100(smoke: bool) -> ConfigDict:
    """The same of CIFAR-100."""
    return _cifar("cifar100", smoke)


def imagenet(smoke: bool) -> ConfigDict:
    """ImageNet-1K at 224 x 224, 300 epochs of nine tenths of its training images; the validation
    images are the test. Departures from DeiT: no repeated augmentation; the learning rate ends at
    1e-5; images are mixed each with one of its own, in shares of its own."""
    task = task_options(
        "image_classification",
        dataset="imagenet2012",
        test_split="validation",
        size=224,
        crop="resized",
        **AUGMENTED,
        erasing=0.25,
    )
    model = _model(width=192, depth=12, patch=16)
    config = _images(task, model, epochs=300, batch_size=1_024, train=1_153_050)
    config.optimizer.warmup_steps = config.steps // 60  # of 300 epochs, 5
    return _smoke(config) if smoke else config


AUGMENTED: dict[str, Any] = {
    "flip": True,
    "rand_augment": (2, 9.0, 0.5),
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


def _cifar(dataset: str, smoke: bool) -> ConfigDict:
    task = task_options("image_classification", dataset=dataset, crop="padded", **AUGMENTED)
    model = _model(width=192, depth=12, patch=4)
    config = _images(task, model, epochs=100, batch_size=256, train=45_000)
    return _smoke(config) if smoke else config


def _model(*, width: int, depth: int, patch: int) -> dict[str, Any]:
    """The section `model` of models/networks/image_classifier.py without pattern and mixers."""
    return {
        "name": "image_classifier",
        "width": width,
        "depth": depth,
        "stem": "patches",
        "patch": patch,
        "positions": "learned",
        "position_grid": (),
        "pooling": "mean",
        "stages": (),
        "mlp": "gelu",
        "mlp_ratio": 4.0,
        "mlp_width": 0,
        "norm": "layer",
        "norm_eps": 1e-6,
        "norm_steps": 60_000,
        "norm_warmup_steps": 0,
        "norm_eta": 1.0,
        "drop_path": 0.0,
        "scan_layers": True,
        "remat": "none",
    }


def _images(
    task: dict[str, Any], model: dict[str, Any], *, epochs: int, batch_size: int, train: int = 1_257
) -> Any:
    steps = epochs * train // batch_size
    config = base(
        task=task,
        model=model,
        steps=steps,
        batch_size=batch_size,
        optimizer={"lr": 1e-3, "weight_decay": 0.05, "end_lr": 1e-5, "warmup_steps": steps // 20},
        evaluation={"examples": 50_000, "best_metric": "validation/accuracy"},
    )
    config.eval.every_steps = config.checkpoint.every_steps = max(steps // 20, 1)
    return config


def _smoke(config: Any) -> Any:
    shrink(config, steps=1_000, batch_size=32, width=32, lr=3e-3)
    config.eval.examples = 512
    return config
