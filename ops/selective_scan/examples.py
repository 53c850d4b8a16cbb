"""Arguments of the selective scan as models have them; ops/framework/examples.py says what is what.

Sizes are width (inner channels) and state size per channel. The variant "gated" has all that a
Mamba layer has: D, the gate z, and step sizes of which a bias and the softplus are part.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6, "state": 4},
    "parity": {"batch": 64, "length": 40, "width": 64, "state": 8},
    "cpu": {"batch": 4, "length": 1024, "width": 128, "state": 16},
    "ragged": {"batch": 2, "length": 333, "width": 96, "state": 16},
    "mamba_130m": {"batch": 8, "length": 2048, "width": 1536, "state": 16},
    "mamba_2_8b": {"batch": 2, "length": 2048, "width": 5120, "state": 16},
    "decode": {"batch": 128, "length": 1, "width": 1536, "state": 16},
    "mamba_370m": {"batch": 8, "length": 2048, "width": 2048, "state": 16},
    "16k": {"batch": 2, "length": 16384, "width": 2048, "state": 16},
    "64k": {"batch": 1, "length": 65536, "width": 2048, "state": 16},
    "1m": {"batch": 1, "length": 1048576, "width": 256, "state": 16},
}
GPU_SHAPES = ("mamba_370m", "16k", "64k", "1m")
VARIANTS = ("", "gated")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """x, delta, A (of S4D's real initialisation), B and C; "gated": D, z and delta_bias besides."""
    rows, D, N = (shape["batch"], shape["length"]), shape["width"], shape["state"]
    keys = jax.random.split(key, 6)
    x, B, C, z = (
        jax.random.normal(key, (*rows, width)).astype(dtype)
        for key, width in zip(keys[:4], (D, N, N, D), strict=True)
    )
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1)[None], (D, N))
    before_softplus, bias = jax.random.normal(keys[4], (*rows, D)), jnp.full((D,), -3.0, "float32")
    if variant == "gated":
        skip = jax.random.normal(keys[5], (D,))
        delta = before_softplus.astype(dtype)
        whole_layer = {"D": skip, "z": z, "delta_bias": bias}
        return {"x": x, "delta": delta, "A": A, "B": B, "C": C} | whole_layer
    delta = jax.nn.softplus(before_softplus + bias[None, None]).astype(dtype)
    return {"x": x, "delta": delta, "A": A, "B": B, "C": C}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {"delta_softplus": variant == "gated"}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
