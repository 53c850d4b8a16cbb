"""Arguments of state passing as dense_scan has them; ops/framework/examples.py says what is what.

The length is a number of parts: of a sequence that is cut over so many devices, or of its chunks.
Sizes are width (systems) and state_size of each.
"""

import math
from typing import Any

import jax

from ..framework.examples import Shape

SHAPES = {
    "cpu": {"batch": 4, "length": 32, "width": 32, "state_size": 16},
    "ragged": {"batch": 2, "length": 11, "width": 96, "state_size": 64},
    "s4_devices": {"batch": 16, "length": 8, "width": 256, "state_size": 64},
}
GPU_SHAPES = ("s4_devices",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """A [width, N, N] in float32, of norm 1, about, and written [B, T, width, N] of `dtype`."""
    batch, length, width, N = (shape[name] for name in ("batch", "length", "width", "state_size"))
    key_A, key_written = jax.random.split(key)
    written = jax.random.normal(key_written, (batch, length, width, N)).astype(dtype)
    return {"A": jax.random.normal(key_A, (width, N, N)) / (2 * math.sqrt(N)), "written": written}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """A times the state; backward once more, and the products that give the gradients of both."""
    products = shape["batch"] * shape["length"] * shape["width"] * shape["state_size"] ** 2
    return 2.0 * products * (1 if direction == "forward" else 3)
