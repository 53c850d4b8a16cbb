"""What `bench --gpu_aot` compiles: the passes of the ops that have GPU kernels, at sizes of
published models."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ops.delta_rule import pallas_gpu as delta_rule
from ops.diagonal_scan import pallas_gpu as diagonal_scan
from ops.gated_linear_attention import pallas_gpu as gated_linear_attention
from ops.selective_scan import gating
from ops.selective_scan import pallas_gpu as selective_scan


@dataclass(frozen=True)
class Program:
    """rule(*arguments), for "sm_90a" (H100, H200) or "sm_80" (A100)."""

    name: str
    architecture: str
    rule: Callable[..., Any]
    arguments: tuple[Any, ...]


def programs() -> Iterator[Program]:
    """All that the report and `make test-all` compile."""
    for direction in ("forward", "backward"):
        yield from _matrix_programs(_gla, direction)
        yield from _matrix_programs(_delta, direction)
        yield from _selective_programs(direction)
        yield from _diagonal_programs(direction)


# B, T, key heads, heads, K, V.
USUAL = (4, 2048, 16, 16, 128, 128)
OTHER_SIZES = ((8, 1024, 8, 8, 64, 64), (8, 2048, 32, 32, 256, 256), (1, 8192, 2, 8, 96, 96))


# A million tokens, and half of them: what memory grows with.
LONG = ((1, 524288, 8, 8, 128, 128), (1, 1048576, 8, 8, 128, 128))


def _matrix_programs(make: Callable[..., Program], direction: str) -> Iterator[Program]:
    for decay in ("none", "constant", "scalar", "vector"):
        yield make(direction, decay)
        yield make(direction, decay, dtype="float32")
    for decay in ("none", "constant", "scalar"):
        yield make(direction, decay, sizes=OTHER_SIZES[0], segments=True)
    for sizes in OTHER_SIZES:
        yield make(direction, "scalar", sizes=sizes)
        yield make(direction, "vector", sizes=sizes, segments=True)
    for decay in ("scalar", "vector"):
        yield make(direction, decay, architecture="sm_80")
        for sizes in LONG:
            yield make(direction, decay, sizes=sizes)


def _matrix(
    rules: Any,
    short: str,
    direction: str,
    decay: str,
    beta: bool,
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
    betas = (shape(B, T, H, dtype=dtype),) if beta else ()
    cotangents = () if direction == "forward" else (v, state)
    name = [short, direction, decay, dtype, f"{B}x{T}", f"{HK}of{H}h", f"{K}x{V}"]
    return Program(
        "_".join([*name, *(["segments"] if segments else []), architecture]),
        architecture,
        functools.partial(getattr(rules, direction), scale=K**-0.5),
        (q, k, v, *betas, decay_log, state, ids, *cotangents),
    )


def _gla(direction: str, decay: str, **options: Any) -> Program:
    return _matrix(gated_linear_attention, "gla", direction, decay, beta=False, **options)


def _delta(direction: str, decay: str, **options: Any) -> Program:
    return _matrix(delta_rule, "delta", direction, decay, beta=True, **options)


def _selective_programs(direction: str) -> Iterator[Program]:
    usual = (8, 2048, 2048, 16)
    forward = direction == "forward"
    # Backward takes the states that forward keeps in training.
    training = [
        (usual, "bfloat16", "training", "sm_90a"),
        (usual, "bfloat16", "training", "sm_80"),
        ((1, 65536, 2048, 16), "bfloat16", "training", "sm_90a"),
    ]
    for sizes, dtype, kind, architecture in (
        *(training if forward else []),
        (usual, "bfloat16", "", "sm_90a"),
        (usual, "bfloat16", "gated", "sm_90a"),
        (usual, "float32", "", "sm_90a"),
        (usual, "bfloat16", "negative", "sm_90a"),
        (usual, "bfloat16", "", "sm_80"),
        (usual, "bfloat16", "gated", "sm_80"),
        ((2, 16384, 2048, 16), "bfloat16", "", "sm_90a"),
        ((1, 65536, 2048, 16), "bfloat16", "", "sm_90a"),
        ((1, 65536, 2048, 16), "bfloat16", "gated", "sm_90a"),
        ((1, 524288, 256, 16), "bfloat16", "", "sm_90a"),
        ((1, 1048576, 256, 16), "bfloat16", "", "sm_90a"),
        ((4, 2048, 1000, 64), "bfloat16", "", "sm_90a"),
    ):
        B, T, D, N = sizes
        # A gate comes with step sizes from a projection, as Mamba has them.
        gated = kind in ("gated", "training")
        x = delta = shape(B, T, D, dtype=dtype)
        b = c = shape(B, T, N, dtype=dtype)
        state, ids = shape(B, D, N), shape(B, T, dtype="int32")
        gate = (x, shape(D)) if gated else (None, None)
        kept = N <= gating.MAX_KEPT_STATES
        starts = shape(B, -(-T // gating.CHUNK), N, D) if kept else None
        name = ["selective_scan", direction, dtype, f"{B}x{T}x{D}x{N}"]
        yield Program(
            "_".join([*name, *([kind] if kind else []), architecture]),
            architecture,
            functools.partial(
                getattr(selective_scan, direction),
                delta_softplus=gated,
                eigenvalue_range=(-1, 1) if kind == "negative" else (0, 1),
                **({"with_chunk_states": kind == "training"} if forward else {}),
            ),
            (
                *(x, delta, shape(D, N), b, c, shape(D), *gate, state, ids),
                *(() if forward else (starts, x, state)),
            ),
        )


def _diagonal_programs(direction: str) -> Iterator[Program]:
    for parts, constant, dtype, (B, T, D), architecture in (
        (2, True, "float32", (8, 2048, 2048), "sm_90a"),
        (2, True, "float32", (8, 2048, 2048), "sm_80"),
        (2, False, "bfloat16", (8, 2048, 2048), "sm_90a"),
        (1, False, "bfloat16", (8, 2048, 2048), "sm_90a"),
        (1, True, "float32", (1, 1048576, 192), "sm_90a"),
    ):
        # Backward takes states in the place of b; they and their cotangent are float32.
        b = (shape(B, T, D, dtype=dtype),) * parts
        a = (shape(D),) * parts if constant else b
        state, h = (shape(B, D),) * parts, (shape(B, T, D),) * parts
        tokens, *cotangents = (b,) if direction == "forward" else (h, h, state)
        kind = "real" if parts == 1 else "complex"
        factors = "constant" if constant else "per_token"
        yield Program(
            f"diagonal_scan_{direction}_{kind}_{factors}_{dtype}_{B}x{T}x{D}_{architecture}",
            architecture,
            getattr(diagonal_scan, direction),
            (a, tokens, state, shape(B, T, dtype="int32"), *cotangents),
        )


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
