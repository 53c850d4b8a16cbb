"""Arguments of the diagonal convolution as models have them; ops/framework/examples.py says what is
what.

Sizes are width (systems) and modes of each, complex ones where the variant is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 3, "modes": 4},
    "cpu": {"batch": 4, "length": 1024, "width": 32, "modes": 32},
    "ragged": {"batch": 2, "length": 333, "width": 96, "modes": 32},
    "s4d_image": {"batch": 50, "length": 1024, "width": 512, "modes": 32},
    "s4d_path_x": {"batch": 16, "length": 16384, "width": 256, "modes": 32},
}
GPU_SHAPES = ("s4d_path_x",)
VARIANTS = ("complex", "real")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, Any]:
    """u [B, T, width] of `dtype`; a, b and c [width, modes] in float32, arrays or pairs of real and
    imaginary part."""
    batch, length, width, modes = (shape[name] for name in ("batch", "length", "width", "modes"))
    keys = jax.random.split(key, 4)
    radius, angle = (jax.random.uniform(key, (width, modes)) for key in keys[:2])
    a = radius * jnp.cos(angle), radius * jnp.sin(angle)
    b, c = (tuple(jax.random.normal(key, (2, width, modes))) for key in keys[2:])
    u = jax.random.normal(key, (batch, length, width)).astype(dtype)
    if variant == "real":
        return {"u": u, "a": a[0], "b": b[0], "c": c[0]}
    return {"u": u, "a": a, "b": b, "c": c}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
