"""What config files of image models share: the recipe of an argument that may name a size."""

from collections.abc import Collection
from typing import Any

from experiments.configs.recipes.base import recipe


def image_recipe(model: str, argument: str, sizes: Collection[str]) -> tuple[Any, str]:
    """(config, size) of "<task>", "<task>,smoke" or "imagenet,<size>", sizes being those that are
    published; "imagenet" is the first of them, and "" the size of all else.

    Raises ValueError for a task that has no images."""
    name, _, variant = argument.partition(",")
    size = variant if variant in sizes else ""
    config: Any = recipe(name if size else argument)
    if config.model.name != "image_classifier":
        raise ValueError(
            f"{model} classifies images: use a task of image_classification, such as digits; got"
            f" {argument!r}"
        )
    if size and name != "imagenet":
        raise ValueError(f"{model} has the size {size!r} for imagenet; got {argument!r}")
    if argument == "imagenet":
        size = next(iter(sizes))
    return config, size
