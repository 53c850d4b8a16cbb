"""Arguments of causal flow attention as models have them; ops/framework/examples.py says what is
what.

Sizes are heads, and key and value size per head.
"""

from typing import Any

import jax

from ..framework.examples import CHUNK, MEASURED, RAGGED_HEADS, Shape, queries_keys_values

SHAPES = {
    "test": {"batch": 2, "length": 129, "key_heads": 2, "heads": 2, "key": 6, "value": 5},
    "cpu": {"batch": 2, "length": 512, "key_heads": 4, "heads": 4, "key": 32, "value": 32},
    "ragged": RAGGED_HEADS,
    "flowformer_wikitext": {
        "batch": 64,
        "length": 512,
        "key_heads": 8,
        "heads": 8,
        "key": 64,
        "value": 64,
    },
    "4x2048_16x128": MEASURED["4x2048_16x128"],
}
GPU_SHAPES = ("4x2048_16x128",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q, k [B, T, H, K] and v [B, T, H, V]."""
    return queries_keys_values(shape, dtype, key)


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = CHUNK) -> float:
    """As gated linear attention, of V columns at the end; flows are vectors."""
    C, K, V = chunk, shape["key"], shape["value"]
    multiply_adds = {
        "forward": 2 * K * V + C * (K + V),
        "backward": 5 * K * V + C * (3 * K + 2 * V),
    }[direction]
    return 2.0 * shape["batch"] * shape["length"] * shape["heads"] * multiply_adds
