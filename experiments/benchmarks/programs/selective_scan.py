"""Selective scan: Mamba's sizes in both directions, ranges and dtypes, with its gate and step
sizes, with segments, and on GPUs a million tokens.

Backward takes the states at the starts of chunks that forward keeps, "training" in the name, where
both do so. Of estimates the unit is 1024 channels."""

import functools
from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.ahead_of_time import GpuProgram, TpuProgram, array
from ops.framework.examples import abstract_inputs
from ops.selective_scan import examples, gating, pallas_gpu, pallas_tpu

CHANNELS = 1024  # of a unit
MAMBA = (2048, 16)  # D, N
OTHER_WIDTHS = ((5120, 16), (768, 64), (200, 5))


def arguments(
    B: int, T: int, D: int, N: int, direction: str, dtype: str, gated: bool, segments: bool
) -> list[Any]:
    """What a rule takes: x, delta, A, B, C, D, z, delta_bias, initial_state and segment_ids;
    backward the states that forward kept, and the cotangents of both outputs. z and delta_bias are
    None but for `gated`."""
    sizes = {"batch": B, "length": T, "width": D, "state": N}
    x = abstract_inputs(examples.inputs, sizes, "gated", dtype)
    gate = [x["z"], x["delta_bias"]] if gated else [None, None]
    state, ids = array(B, D, N), array(B, T, dtype="int32") if segments else None
    inputs = [*(x[name] for name in ("x", "delta", "A", "B", "C", "D")), *gate, state, ids]
    if direction == "forward":
        return inputs
    chunks = -(-T // gating.CHUNK)
    kept = array(B, chunks, N, D) if N <= gating.MAX_KEPT_STATES else None
    return [*inputs, kept, x["x"], state]


def options(direction: str, gated: bool, negative: bool, training: bool) -> dict[str, Any]:
    """The other arguments of a rule."""
    eigenvalue_range = (-1, 1) if negative else (0, 1)
    both = {"delta_softplus": gated, "eigenvalue_range": eigenvalue_range}
    return both | ({"with_chunk_states": training} if direction == "forward" else {})


def tpu_programs() -> Iterator[TpuProgram]:
    for direction in ("forward", "backward"):
        make = functools.partial(_tpu_program, direction)
        yield make("v6e", analyse=True)
        yield make("v6e", gated=True, analyse=True)
        yield make("v6e", dtype="float32", analyse=True)
        yield make("v6e", negative=True, analyse=True)
        yield make("v6e", segments=True, analyse=True)
        for widths in OTHER_WIDTHS:
            yield make("v6e", widths=widths, analyse=widths[1] > gating.MAX_KEPT_STATES)
        for generation in ("v5e", "v5p", "v4", "tpu7x"):
            yield make(generation)
        yield make("v5e", gated=True)
    for gated in (False, True):
        yield _tpu_program("forward", "v6e", gated=gated, training=True, analyse=True)
    yield _tpu_program("forward", "v5e", gated=True, training=True)


def _tpu_program(
    direction: str,
    generation: str,
    *,
    dtype: str = "bfloat16",
    widths: tuple[int, int] = MAMBA,
    negative: bool = False,
    gated: bool = False,
    segments: bool = False,
    training: bool = False,
    analyse: bool = False,
) -> TpuProgram:
    D, N = widths
    # Forward keeps states only in training, and backward takes them where they are not too many.
    makes_states = direction == "backward" and N > gating.MAX_KEPT_STATES
    name = [
        "selective_scan",
        direction,
        dtype,
        f"{D}x{N}",
        *(["negative"] if negative else []),
        *(["gated"] if gated else []),
        *(["segments"] if segments else []),
        *(["training"] if training else []),
        generation,
    ]
    return TpuProgram(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=functools.partial(
            getattr(pallas_tpu, direction), **options(direction, gated, negative, training)
        ),
        arguments=lambda T: arguments(1, T, D, N, direction, dtype, gated, segments),
        kernels=2 if makes_states else 1,
        units=max(1, D // CHANNELS),
        kept_bytes=lambda T: (
            -(-T // pallas_tpu.backward_chunk(N)) * D * N * 4 if makes_states else 0
        ),
        analyse=analyse,
    )


def gpu_programs() -> Iterator[GpuProgram]:
    usual = (8, 2048, *MAMBA)
    for direction in ("forward", "backward"):
        training = [
            (usual, "bfloat16", "training", "sm_90a"),
            (usual, "bfloat16", "training", "sm_80"),
            ((1, 65536, *MAMBA), "bfloat16", "training", "sm_90a"),
        ]
        for sizes, dtype, kind, architecture in (
            *(training if direction == "forward" else []),
            (usual, "bfloat16", "", "sm_90a"),
            (usual, "bfloat16", "gated", "sm_90a"),
            (usual, "float32", "", "sm_90a"),
            (usual, "bfloat16", "negative", "sm_90a"),
            (usual, "bfloat16", "", "sm_80"),
            (usual, "bfloat16", "gated", "sm_80"),
            ((2, 16384, *MAMBA), "bfloat16", "", "sm_90a"),
            ((1, 65536, *MAMBA), "bfloat16", "", "sm_90a"),
            ((1, 65536, *MAMBA), "bfloat16", "gated", "sm_90a"),
            ((1, 524288, 256, 16), "bfloat16", "", "sm_90a"),
            ((1, 1048576, 256, 16), "bfloat16", "", "sm_90a"),
            ((4, 2048, 1000, 64), "bfloat16", "", "sm_90a"),
        ):
            yield _gpu_program(direction, sizes, dtype, kind, architecture)


def _gpu_program(
    direction: str, sizes: tuple[int, ...], dtype: str, kind: str, architecture: str
) -> GpuProgram:
    B, T, D, N = sizes
    # A gate comes with step sizes from a projection, as Mamba has them.
    gated = kind in ("gated", "training")
    name = ["selective_scan", direction, dtype, f"{B}x{T}x{D}x{N}", *([kind] if kind else [])]
    return GpuProgram(
        name="_".join([*name, architecture]),
        architecture=architecture,
        rule=functools.partial(
            getattr(pallas_gpu, direction),
            **options(direction, gated, kind == "negative", kind == "training"),
        ),
        arguments=lambda: arguments(B, T, D, N, direction, dtype, gated, segments=True),
    )
