"""Arguments of the short convolution as models have them; ops/framework/examples.py says what is
what.

Sizes are width (channels) and taps.
"""

from typing import Any

import jax

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6, "taps": 4},
    "parity": {"batch": 64, "length": 40, "width": 64, "taps": 4},
    "cpu": {"batch": 4, "length": 1024, "width": 128, "taps": 4},
    "ragged": {"batch": 2, "length": 333, "width": 96, "taps": 4},
    "mamba_130m": {"batch": 8, "length": 2048, "width": 1536, "taps": 4},
    "delta_net_1_3b": {"batch": 4, "length": 2048, "width": 2048, "taps": 4},
    "decode": {"batch": 128, "length": 1, "width": 1536, "taps": 4},
    "mamba_370m": {"batch": 8, "length": 2048, "width": 2048, "taps": 4},
}
GPU_SHAPES = ("mamba_370m",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """x [B, T, width], and w [taps, width], a parameter."""
    key_x, key_w = jax.random.split(key)
    x = jax.random.normal(key_x, (shape["batch"], shape["length"], shape["width"]))
    return {"x": x.astype(dtype), "w": jax.random.normal(key_w, (shape["taps"], shape["width"]))}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
