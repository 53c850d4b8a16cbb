"""Arguments of attention within a neighbourhood as models have them; ops/framework/examples.py says
what is what.

Sizes are query heads, key (and value) heads, key and value size per head, and the radius. The grid
has the most equal two extents that there are for the length.
"""

import math
from typing import Any

import jax

from ..framework.examples import RAGGED_HEADS, Shape, grid_of, queries_of_shared_keys

SHAPES = {
    "test": {
        "batch": 2,
        "length": 120,
        "heads": 4,
        "key_heads": 2,
        "key": 6,
        "value": 5,
        "radius": 2,
    },
    "cpu": {
        "batch": 1,
        "length": 1024,
        "heads": 4,
        "key_heads": 4,
        "key": 32,
        "value": 32,
        "radius": 4,
    },
    "ragged": {**RAGGED_HEADS, "radius": 3},
    "clear_flux": {
        "batch": 1,
        "length": 4096,
        "heads": 24,
        "key_heads": 24,
        "key": 128,
        "value": 128,
        "radius": 8,
    },
}
GPU_SHAPES = ("clear_flux",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V]."""
    return queries_of_shared_keys(shape, dtype, key)


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {"grid": grid_of(shape["length"]), "radius": shape["radius"]}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Logits within the disc, of an interior token, and their use; backward the logits again and
    four gradients."""
    radius, K, V = shape["radius"], shape["key"], shape["value"]
    span = range(1 - math.ceil(radius), math.ceil(radius))
    disc = sum(y * y + x * x < radius**2 for y in span for x in span)
    tokens = shape["batch"] * shape["length"] * shape["heads"] * disc
    return 2.0 * tokens * {"forward": K + V, "backward": 3 * K + 2 * V}[direction]
