"""Arguments of the diagonal scan as models have them; ops/framework/examples.py says what is what.

Sizes are channels of the state, complex ones where the variant is. Factors are constant, as in S5
and LRU, or one per token, as in HGRN.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "channels": 6},
    "parity": {"batch": 64, "length": 40, "channels": 64},
    "cpu": {"batch": 4, "length": 1024, "channels": 128},
    "ragged": {"batch": 2, "length": 333, "channels": 96},
    "s5_image": {"batch": 50, "length": 1024, "channels": 192},
    "s5_path_x": {"batch": 32, "length": 16384, "channels": 128},
    "decode": {"batch": 128, "length": 1, "channels": 128},
    "2k": {"batch": 8, "length": 2048, "channels": 2048},
    "64k": {"batch": 1, "length": 65536, "channels": 2048},
}
GPU_SHAPES = ("2k", "64k")
VARIANTS = ("complex", "real", "complex, per token", "real, per token")


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, Any]:
    """a, [channels] in float32 or [B, T, channels], and b [B, T, channels]: arrays, or pairs of
    real and imaginary part."""
    of_tokens = (shape["batch"], shape["length"], shape["channels"])
    per_token = variant.endswith("per token")
    keys = jax.random.split(key, 4)
    radius, angle = (
        jax.random.uniform(key, of_tokens if per_token else of_tokens[2:]) for key in keys[:2]
    )
    a = (radius * jnp.cos(angle), radius * jnp.sin(angle))
    a = tuple(x.astype(dtype if per_token else "float32") for x in a)
    b = tuple(jax.random.normal(key, of_tokens).astype(dtype) for key in keys[2:])
    return {"a": a, "b": b} if variant.startswith("complex") else {"a": a[0], "b": b[0]}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
