"""Arguments of flow attention as models have them; ops/framework/examples.py says what is what.

Sizes are heads, and key and value size per head.
"""

from typing import Any

import jax

from ..framework.examples import MEASURED, RAGGED_HEADS, Shape, queries_keys_values

SHAPES = {
    "test": {"batch": 2, "length": 120, "key_heads": 2, "heads": 2, "key": 6, "value": 5},
    "cpu": {"batch": 2, "length": 512, "key_heads": 4, "heads": 4, "key": 32, "value": 32},
    "ragged": RAGGED_HEADS,
    "flowformer_image": {
        "batch": 64,
        "length": 3136,
        "key_heads": 12,
        "heads": 12,
        "key": 8,
        "value": 8,
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


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """One sum of K x V over the sources and one reading by each sink; backward both once more, the
    sum over the sinks, and three gradients. Flows are vectors."""
    products = {"forward": 2, "backward": 6}[direction]
    tokens = shape["batch"] * shape["length"] * shape["heads"]
    return 2.0 * tokens * products * shape["key"] * shape["value"]
