"""What `bench --gpu_aot` compiles: the passes of the ops that have GPU kernels, at sizes of published models."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ops.gated_linear_attention import pallas_gpu as gla


@dataclass(frozen=True)
class Program:
    """rule(*arguments), for "sm_90a" (H100, H200) or "sm_80" (A100)."""

    name: str
    architecture: str
    rule: Callable[..., Any]
    arguments: tuple[Any, ...]


def programs() -> Iterator[Program]:
    """All that the report and `make test-all` compile."""
    yield from gla_programs()


# B, T, key heads, heads, K, V.
USUAL = (4, 2048, 16, 16, 128, 128)
OTHER_SIZES = (
    (8, 1024, 8, 8, 64, 64),
    (8, 2048, 32, 32, 256, 256),
    (1, 8192, 2, 8, 96, 96),
)


def gla_programs() -> Iterator[Program]:
    for direction in ("forward", "backward"):
        make = functools.partial(_gla, direction)
        for decay in ("none", "constant", "scalar", "vector"):
            yield make(decay)
            yield make(decay, dtype="float32")
        for sizes in OTHER_SIZES:
            yield make("scalar", sizes=sizes)
            yield make("vector", sizes=sizes, segments=True)
        for decay in ("scalar", "vector"):
            yield make(decay, architecture="sm_80")


def _gla(
    direction: str,
    decay: str,
    *,
    dtype: str = "bfloat16",
    sizes: tuple[int, ...] = USUAL,
    segments: bool = False,
    architecture: str = "sm_90a",
) -> Program:
    B, T, HK, H, K, V = sizes
    decay_log = {
        "none": None,
        "constant": shape(H),
        "scalar": shape(B, T, H),
        "vector": shape(B, T, H, K, dtype=dtype),
    }[decay]
    state, ids = shape(B, H, K, V), shape(B, T, dtype="int32") if segments else None
    q = k = shape(B, T, HK, K, dtype=dtype)
    v = shape(B, T, H, V, dtype=dtype)
    cotangents = () if direction == "forward" else (v, state)
    name = ["gla", direction, decay, dtype, f"{B}x{T}", f"{HK}of{H}h", f"{K}x{V}"]
    return Program(
        "_".join([*name, *(["segments"] if segments else []), architecture]),
        architecture,
        functools.partial(getattr(gla, direction), scale=K**-0.5),
        (q, k, v, decay_log, state, ids, *cotangents),
    )


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
