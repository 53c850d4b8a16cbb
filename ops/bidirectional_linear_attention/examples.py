"""Arguments of linear attention to all tokens as models have them; ops/framework/examples.py says
what is what.

Sizes are query heads, key (and value) heads, key and value size per head. The shape "short" is
short enough for the order (q k^T) v. Features are elu + 1.
"""

from typing import Any

import jax

from ..framework.examples import MEASURED, RAGGED_HEADS, Shape, queries_keys_values

SHAPES = {
    "test": {"batch": 2, "length": 120, "heads": 2, "key_heads": 2, "key": 8, "value": 12},
    "cpu": {"batch": 2, "length": 1024, "heads": 4, "key_heads": 4, "key": 32, "value": 32},
    "short": {"batch": 4, "length": 16, "heads": 4, "key_heads": 4, "key": 32, "value": 32},
    "ragged": RAGGED_HEADS,
    "slab_deit_t": {"batch": 64, "length": 196, "heads": 3, "key_heads": 3, "key": 64, "value": 64},
    "linfusion_sdxl": {
        "batch": 1,
        "length": 4096,
        "heads": 10,
        "key_heads": 10,
        "key": 64,
        "value": 64,
    },
    "4x2048_16x128": MEASURED["4x2048_16x128"],
}
GPU_SHAPES = ("4x2048_16x128", "linfusion_sdxl")
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], k [B, T, HK, K] and v [B, T, HK, V]; q and k positive."""
    key_q, key_rest = jax.random.split(key)
    arrays = queries_keys_values({**shape, "heads": shape["key_heads"]}, "float32", key_rest)
    sizes = (shape["batch"], shape["length"], shape["heads"], shape["key"])
    q, k = (jax.nn.elu(x) + 1 for x in (jax.random.normal(key_q, sizes), arrays["k"]))
    return {name: x.astype(dtype) for name, x in (("q", q), ("k", k), ("v", arrays["v"]))}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """One sum of K x V over the keys and one reading by each query; backward both once more, the
    sum over the queries, and three gradients."""
    products = {"forward": 2, "backward": 6}[direction]
    tokens = shape["batch"] * shape["length"] * shape["heads"]
    return 2.0 * tokens * products * shape["key"] * shape["value"]
