"""Arguments of window attention as models have them; ops/framework/examples.py says what is what.

Sizes are query heads, key (and value) heads, key and value size per head, and the window.
"""

from typing import Any

import jax

from ..framework.examples import MEASURED, RAGGED_HEADS, Shape, queries_of_shared_keys

SHAPES = {
    "test": {
        "batch": 2,
        "length": 129,
        "heads": 4,
        "key_heads": 2,
        "key": 8,
        "value": 12,
        "window": 37,
    },
    "cpu": {
        "batch": 4,
        "length": 512,
        "heads": 4,
        "key_heads": 4,
        "key": 32,
        "value": 32,
        "window": 64,
    },
    "based_1_3b": {
        "batch": 4,
        "length": 2048,
        "heads": 16,
        "key_heads": 16,
        "key": 112,
        "value": 112,
        "window": 128,
    },
    "long_window": {
        "batch": 1,
        "length": 8192,
        "heads": 32,
        "key_heads": 8,
        "key": 64,
        "value": 64,
        "window": 2048,
    },
    "decode": {
        "batch": 128,
        "length": 1,
        "heads": 16,
        "key_heads": 16,
        "key": 112,
        "value": 112,
        "window": 128,
    },
    "ragged": {**RAGGED_HEADS, "window": 128},
    "4x2048_16x128": {**MEASURED["4x2048_16x128"], "window": 128},
}
GPU_SHAPES = ("4x2048_16x128",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V]."""
    return queries_of_shared_keys(shape, dtype, key)


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {"window": shape["window"]}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Scores within the window and their use; backward the scores again and four gradients."""
    tokens = shape["batch"] * shape["length"] * shape["heads"] * shape["window"]
    K, V = shape["key"], shape["value"]
    return 2.0 * tokens * {"forward": K + V, "backward": 3 * K + 2 * V}[direction]
