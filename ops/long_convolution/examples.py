"""Arguments of the long convolution as models have them; ops/framework/examples.py says what is
what.

Sizes are width (channels). Kernels are those of a state space model: they die out.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework.examples import Shape

SHAPES = {
    "test": {"batch": 2, "length": 129, "width": 6},
    "cpu": {"batch": 4, "length": 1024, "width": 32},
    "ragged": {"batch": 2, "length": 333, "width": 96},
    "s4_image": {"batch": 50, "length": 1024, "width": 512},
    "s4_path_x": {"batch": 16, "length": 16384, "width": 256},
}
GPU_SHAPES = ("s4_path_x",)
VARIANTS = ("",)


def inputs(shape: Shape, variant: str, dtype: str, key: jax.Array) -> dict[str, jax.Array]:
    """u [B, T, width], and the kernel [width, T] in float32."""
    B, T, D = (shape[name] for name in ("batch", "length", "width"))
    key_u, key_kernel = jax.random.split(key)
    kernel = jax.random.normal(key_kernel, (D, T)) * jnp.exp(-jnp.arange(T) / 64)[None]
    return {"u": jax.random.normal(key_u, (B, T, D)).astype(dtype), "kernel": kernel}


def options(shape: Shape, variant: str) -> dict[str, Any]:
    return {}


def matmul_flops(shape: Shape, direction: str, chunk: int = 0) -> float:
    return 0.0
