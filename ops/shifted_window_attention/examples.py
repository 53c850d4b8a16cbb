"""Arguments of attention within windows as models have them; ops/framework/examples.py says what is
what.

Sizes are query heads, key (and value) heads, key and value size per head, and the edge of a window.
The grid has the most equal two extents that there are for the length. Variants: windows in place,
and shifted by half.
"""

from typing import Any

import jax

from ..framework.examples import RAGGED_HEADS, Shape, grid_of, queries_of_shared_keys

SHAPES = {
    "test": {
        "batch": 2,
        "length": 120,
        "heads": 2,
        "key_heads": 2,
        "key": 6,
        "value": 5,
        "window": 6,
    },
    "cpu": {
        "batch": 2,
        "length": 1024,
        "heads": 4,
        "key_heads": 4,
        "key": 32,
        "value": 32,
        "window": 8,
    },
    "ragged": {**RAGGED_HEADS, "window": 9},
    "swin_t_stage_1": {
        "batch": 64,
        "length": 3136,
        "heads": 3,
        "key_heads": 3,
        "key": 32,
        "value": 32,
        "window": 7,
    },
}
GPU_SHAPES = ("swin_t_stage_1",)
VARIANTS = ("in place", "shifted")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V]."""
    return queries_of_shared_keys(shape, dtype, key)


def options(shape: Shape, variant: str) -> dict[str, Any]:
    grid = grid_of(shape["length"])
    window = tuple(
        max(x for x in range(1, shape["window"] + 1) if extent % x == 0) for extent in grid
    )
    shift = tuple(size // 2 for size in window) if variant == "shifted" else None
    return {"grid": grid, "window": window, "shift": shift}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Logits within the window and their use; backward the logits again and four gradients."""
    tokens = shape["batch"] * shape["length"] * shape["heads"] * shape["window"] ** 2
    K, V = shape["key"], shape["value"]
    return 2.0 * tokens * {"forward": K + V, "backward": 3 * K + 2 * V}[direction]
