"""Arguments of the dense scan as models have them; ops/framework/examples.py says what is what.

Sizes are width (systems), state size and outputs of each system.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import CHUNK, Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 3, "state_size": 4, "outputs": 2},
    "cpu": {"batch": 4, "length": 1024, "width": 32, "state_size": 16, "outputs": 1},
    "ragged": {"batch": 2, "length": 333, "width": 96, "state_size": 64, "outputs": 1},
    "lssl_image": {"batch": 50, "length": 784, "width": 128, "state_size": 128, "outputs": 1},
    "s4_image": {"batch": 50, "length": 1024, "width": 512, "state_size": 64, "outputs": 1},
    "decode": {"batch": 128, "length": 1, "width": 512, "state_size": 64, "outputs": 1},
}
GPU_SHAPES = ("s4_image",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """u, and of each system A, B and C. A rotates by small angles and contracts, as a discretised
    system does: 0.99 times the Cayley transform of a skew-symmetric matrix."""
    D, N, M = (shape[name] for name in ("width", "state_size", "outputs"))
    keys = jax.random.split(key, 4)
    u = jax.random.normal(keys[0], (shape["batch"], shape["length"], D))
    square = jax.random.normal(keys[1], (D, N, N)) / jnp.sqrt(N)
    skew, one = 0.05 * (square - square.mT), jnp.eye(N)[None]
    return {
        "u": u.astype(dtype),
        "A": 0.99 * jnp.linalg.solve(one - skew, one + skew),
        "B": jax.random.normal(keys[2], (D, N)),
        "C": jax.random.normal(keys[3], (D, M, N)) / N,
    }


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = CHUNK) -> float:
    """Of chunks: their own tokens, reads of the state, writes to it, and its way through them.

    The backward pass does it again, and two products for each."""
    N, outputs = shape["state_size"], shape["outputs"]
    of_chunk = chunk * chunk * outputs + chunk * outputs * N + chunk * N + N * N
    chunks = shape["batch"] * shape["width"] * shape["length"] / chunk
    return 2.0 * chunks * of_chunk * (1 if direction == "forward" else 3)
