"""Arguments of gated linear attention as models have them; ops/framework/examples.py says what is
what.

Sizes are key heads, value heads, and key and value size per head; variants are kinds of decay.
"""

from typing import Any

import jax

from ..framework import examples
from ..framework.examples import CHUNK, MEASURED, RAGGED_HEADS, Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "key_heads": 2, "heads": 4, "key": 20, "value": 24},
    "cpu": {"batch": 1, "length": 2048, "key_heads": 4, "heads": 4, "key": 64, "value": 64},
    "ragged": RAGGED_HEADS,
    "gla_340m": {"batch": 8, "length": 2048, "key_heads": 4, "heads": 4, "key": 128, "value": 256},
    "mamba2_1_3b": {
        "batch": 4,
        "length": 2048,
        "key_heads": 1,
        "heads": 64,
        "key": 128,
        "value": 64,
    },
    "lightning_7b": {
        "batch": 1,
        "length": 8192,
        "key_heads": 32,
        "heads": 32,
        "key": 128,
        "value": 128,
    },
    **MEASURED,
}
GPU_SHAPES = tuple(MEASURED)
VARIANTS = ("none", "constant", "scalar", "vector")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q, k, v, and decay_log but for the variant "none"."""
    key_heads, key_decay = jax.random.split(key)
    return examples.queries_keys_values(shape, dtype, key_heads) | examples.decays(
        shape, variant, dtype, key_decay
    )


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = CHUNK) -> float:
    """Per token and head, forward: scores and their use within a chunk, a write to the state and a
    read of it. Backward: the states once more, and the gradients of these products."""
    C, K, V = chunk, shape["key"], shape["value"]
    multiply_adds = {
        "forward": 2 * K * V + C * (K + V),
        "backward": 5 * K * V + C * (3 * K + 2 * V),
    }[direction]
    return 2.0 * shape["batch"] * shape["length"] * shape["heads"] * multiply_adds
