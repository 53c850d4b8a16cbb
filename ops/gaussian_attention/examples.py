"""Arguments of Gaussian-kernel attention as models have them; ops/framework/examples.py says what
is what.

Sizes are heads, key and value size per head, and landmarks, which are tokens at equal distances.
"""

from typing import Any

import jax

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 50, "heads": 2, "key": 8, "value": 5, "landmarks": 9},
    "cpu": {"batch": 2, "length": 512, "heads": 4, "key": 32, "value": 32, "landmarks": 16},
    "ragged": {"batch": 2, "length": 333, "heads": 4, "key": 32, "value": 64, "landmarks": 49},
    "soft_tiny_stage_1": {
        "batch": 64,
        "length": 3136,
        "heads": 2,
        "key": 32,
        "value": 32,
        "landmarks": 49,
    },
}
GPU_SHAPES = ("soft_tiny_stage_1",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q [B, T, H, K], landmarks [B, m, H, K] and v [B, T, H, V]."""
    B, T, H, K, V = (shape[name] for name in ("batch", "length", "heads", "key", "value"))
    key_q, key_v = jax.random.split(key)
    q = jax.random.normal(key_q, (B, T, H, K)) / 2  # weights of tokens of about 1/4
    v = jax.random.normal(key_v, (B, T, H, V))
    count = min(shape["landmarks"], T)
    landmarks = q[:, :: T // count][:, :count]
    arrays = {"q": q, "landmarks": landmarks, "v": v}
    return {name: x.astype(dtype) for name, x in arrays.items()}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Distances to the landmarks, the sum over tokens and the reading by them; backward the first
    two again and six gradients. What the inverse takes does not grow with the tokens."""
    tokens = shape["batch"] * shape["length"] * shape["heads"] * shape["landmarks"]
    K, V = shape["key"], shape["value"]
    return 2.0 * tokens * {"forward": K + 2 * V, "backward": 3 * K + 5 * V}[direction]
