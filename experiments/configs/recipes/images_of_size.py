"""What config files of image models share: the recipe of an argument that may name a size."""

from collections.abc import Collection
from typing import Any

from experiments.configs.recipes.base import recipe


def image_recipe(model: str, argument: str, sizes: Collection[str]) -> tuple[Any, str]:
    """`sized_recipe` of a classifier, whose sizes are for "imagenet"."""
    return sized_recipe(
        *(model, argument, sizes),
        large="imagenet",
        network="image_classifier",
        expected="classifies images: use a task of image_classification, such as digits",
    )


def sized_recipe(
    model: str, argument: str, sizes: Collection[str], *, large: str, network: str, expected: str
) -> tuple[Any, str]:
    """(config, size) of "<task>", "<task>,smoke" or "<large>,<size>", sizes being those that are
    published; "<large>" is the first of them, and "" the size of all else.

    Raises ValueError, with what is `expected`, for a task of another network."""
    name, _, variant = argument.partition(",")
    size = variant if variant in sizes else ""
    config: Any = recipe(name if size else argument)
    if config.model.name != network:
        raise ValueError(f"{model} {expected}; got {argument!r}")
    if size and name != large:
        raise ValueError(f"{model} has the size {size!r} for {large}; got {argument!r}")
    if argument == large and sizes:
        size = next(iter(sizes))
    return config, size
