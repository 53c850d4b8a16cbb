"""Arguments of polynomial Kronecker attention as models have them; ops/framework/examples.py says
what is what.

Sizes are heads, and key and value size per head.
"""

import math
from typing import Any

import jax

from ..framework.examples import Shape
from ..kronecker_attention.examples import inputs as kronecker_inputs

SHAPES = {
    "test": {"batch": 2, "length": 129, "heads": 2, "key": 3, "value": 5},
    "cpu": {"batch": 1, "length": 512, "heads": 2, "key": 4, "value": 16},
    "ragged": {"batch": 2, "length": 333, "heads": 4, "key": 8, "value": 32},
    "4x4096_8x8": {"batch": 4, "length": 4096, "heads": 8, "key": 8, "value": 64},
}
GPU_SHAPES = ("4x4096_8x8",)
VARIANTS = ("",)
DEGREE = 2


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q, k1, k2 [B, T, H, K] and v1, v2 [B, T, H, V]."""
    return kronecker_inputs(shape, variant, dtype, key)


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {"degree": DEGREE}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Two sums and their product, read by each query; backward once more, and twice their
    gradients."""
    products = {"forward": 1, "backward": 3}[direction]
    tokens = shape["batch"] * shape["length"] * shape["heads"]
    features = math.comb(shape["key"] + DEGREE, DEGREE)
    return 2.0 * products * tokens * 4 * features * (shape["value"] + 1)
