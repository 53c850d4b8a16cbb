"""Arguments of the diagonal convolution as models have them; ops/framework/examples.py says what is
what.

Sizes are width (systems) and modes of each, complex ones where the variant is, as in S4D.
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
GPU_SHAPES = ("s4d_image", "s4d_path_x")
VARIANTS = ("complex", "real")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, Any]:
    """u, and a, b and c [width, modes]: arrays, or pairs of real and imaginary part. a lies in the
    unit disc, near its edge."""
    systems = shape["width"], shape["modes"]
    keys = jax.random.split(key, 7)
    u = jax.random.normal(keys[0], (shape["batch"], shape["length"], shape["width"]))
    radius = 1 - jnp.exp(-2 - 3 * jax.random.uniform(keys[1], systems))
    angle = jnp.pi * jax.random.uniform(keys[2], systems)
    a = (radius * jnp.cos(angle), radius * jnp.sin(angle))
    b, c = (
        tuple(jax.random.normal(key, systems) / shape["modes"] for key in pair)
        for pair in (keys[3:5], keys[5:7])
    )
    numbers = {"a": a, "b": b, "c": c}
    if variant == "real":
        numbers = {name: real for name, (real, _) in numbers.items()}
    return {"u": u.astype(dtype), **numbers}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
