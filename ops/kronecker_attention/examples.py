"""Arguments of Kronecker attention as models have them; ops/framework/examples.py says what is
what.

Sizes are heads, and key and value size per head; entries of q and of keys are below one, as the
theory wants them. `polynomial_kronecker_attention` takes the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 33, "heads": 2, "key": 3, "value": 5},
    "cpu": {"batch": 1, "length": 256, "heads": 2, "key": 4, "value": 16},
    "ragged": {"batch": 1, "length": 133, "heads": 4, "key": 8, "value": 32},
    "1x512_4x8": {"batch": 1, "length": 512, "heads": 4, "key": 8, "value": 64},
}
GPU_SHAPES = ("1x512_4x8",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """q, k1, k2 [B, T, H, K] and v1, v2 [B, T, H, V]."""
    B, T, H, K, V = (shape[name] for name in ("batch", "length", "heads", "key", "value"))
    keys = jax.random.split(key, 5)
    bounded = [jnp.tanh(jax.random.normal(one, (B, T, H, K))) for one in keys[:3]]
    # Of values with a mean: sums of those without cancel, and products of them again.
    values = [1 + jax.random.normal(one, (B, T, H, V)) for one in keys[3:]]
    names = ("q", "k1", "k2", "v1", "v2")
    return {name: x.astype(dtype) for name, x in zip(names, (*bounded, *values), strict=True)}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    """Scores and sums of all triples; backward once more, and twice their gradients."""
    products = {"forward": 1, "backward": 3}[direction]
    triples = shape["batch"] * shape["heads"] * shape["length"] ** 3
    return 2.0 * products * triples * (shape["key"] + shape["value"])
