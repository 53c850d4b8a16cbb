"""Arguments of the delta rule as models have them; ops/framework/examples.py says what is what.

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
    "delta_net_1_3b": {
        "batch": 4,
        "length": 2048,
        "key_heads": 16,
        "heads": 16,
        "key": 128,
        "value": 128,
    },
    "gated_delta_net_1_3b": {
        "batch": 4,
        "length": 4096,
        "key_heads": 6,
        "heads": 6,
        "key": 256,
        "value": 512,
    },
    "kda_3b": {"batch": 1, "length": 8192, "key_heads": 32, "heads": 32, "key": 128, "value": 128},
    **MEASURED,
}
GPU_SHAPES = tuple(MEASURED)
VARIANTS = ("none", "constant", "scalar", "vector")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q, k, v, beta [B, T, H] between 0 and 1, and decay_log but for the variant "none"."""
    key_heads, key_decay, key_beta = jax.random.split(key, 3)
    beta = jax.random.uniform(key_beta, (shape["batch"], shape["length"], shape["heads"]))
    return (
        examples.queries_keys_values(shape, dtype, key_heads)
        | {"beta": beta.astype(dtype)}
        | examples.decays(shape, variant, dtype, key_decay)
    )


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = CHUNK) -> float:
    """Per token and head, forward: keys with keys, what a chunk writes as W and U, W with the
    state; then as gated linear attention. Backward: all that a chunk writes twice more, once for
    the states and once for the gradients."""
    C, K, V = chunk, shape["key"], shape["value"]
    writes = C * (2 * K + V) + K * V
    multiply_adds = {
        "forward": writes + 2 * K * V + C * (K + V),
        "backward": 2 * writes + 8 * K * V + C * (5 * K + 4 * V),
    }[direction]
    return 2.0 * shape["batch"] * shape["length"] * shape["heads"] * multiply_adds
