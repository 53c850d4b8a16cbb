"""Tokens that lie on a grid of one, two or three dimensions, in raster order: the last dimension
fastest."""

import math
from typing import Any


def check_grid(grid: Any, length: int) -> tuple[int, ...]:
    """The grid. Raises ValueError unless it is a tuple of one to three sizes of `length` tokens in
    all."""
    check_sizes("grid", grid, "1 to 3 integers >= 1", None, 1)
    if not 1 <= len(grid) <= 3 or math.prod(grid) != length:
        raise ValueError(
            f"grid must be 1 to 3 integers whose product is the length of q, {length}; got {grid!r}"
        )
    return tuple(grid)


def check_sizes(name: str, sizes: Any, expectation: str, count: int | None, least: int) -> None:
    """Raises ValueError unless `sizes` is a tuple or list of Python integers >= `least`, `count` of
    them."""
    good = isinstance(sizes, tuple | list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= least for size in sizes
    )
    if not good or (count is not None and len(sizes) != count):
        raise ValueError(f"{name} must be {expectation}; got {sizes!r}")
