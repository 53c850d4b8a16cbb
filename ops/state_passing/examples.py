"""Arguments of state passing as models have them; ops/framework/examples.py says what is what.

Sizes are systems, states of each, and as the length the parts of a sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 9, "systems": 3, "state": 4},
    "cpu": {"batch": 4, "length": 16, "systems": 32, "state": 64},
    "ragged": {"batch": 2, "length": 7, "systems": 96, "state": 64},
    "s4_image": {"batch": 50, "length": 16, "systems": 512, "state": 64},
}
GPU_SHAPES = ("s4_image",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """A [systems, N, N], which contracts, and what parts write, [B, parts, systems, N]."""
    key_A, key_written = jax.random.split(key)
    D, N = shape["systems"], shape["state"]
    A = 0.5 * jax.random.normal(key_A, (D, N, N)) / jnp.sqrt(N)
    written = jax.random.normal(key_written, (shape["batch"], shape["length"], D, N))
    return {"A": A, "written": written.astype(dtype)}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """A times the state of each part; backward also its gradient."""
    per_part = shape["systems"] * shape["state"] ** 2 * {"forward": 1, "backward": 2}[direction]
    return 2.0 * shape["batch"] * shape["length"] * per_part
