"""Diagonal scan: real and complex, constant factors and one per token; of estimates the unit is
1024 (complex) channels."""

import functools
from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.ahead_of_time import GpuProgram, TpuProgram, array
from ops.diagonal_scan import examples, pallas_gpu, pallas_tpu
from ops.framework.examples import abstract_inputs

CHANNELS = 1024  # of a unit
S5_IMAGE = examples.SHAPES["s5_image"]["channels"]  # no whole tiles
Number = tuple[Any, ...]  # (real,) or (real, imaginary)


def numbers(
    B: int, T: int, channels: int, direction: str, parts: int, constant: bool, dtype: str
) -> list[Number]:
    """What a rule takes but for segment_ids, which stand in the fourth place: factors, tokens and
    initial state; backward states in the place of tokens and the cotangents of both outputs, which
    are float32."""
    variant = ("real" if parts == 1 else "complex") + ("" if constant else ", per token")
    sizes = {"batch": B, "length": T, "channels": channels}
    inputs = abstract_inputs(examples.inputs, sizes, variant, dtype)
    a, b = (x if isinstance(x, tuple) else (x,) for x in (inputs["a"], inputs["b"]))
    state, h = (array(B, channels),) * parts, (array(B, T, channels),) * parts
    return [a, b, state] if direction == "forward" else [a, h, state, h, state]


def tpu_programs() -> Iterator[TpuProgram]:
    for direction in ("forward", "backward"):
        make = functools.partial(_tpu_program, direction)
        for parts in (1, 2):
            yield make("v6e", parts, constant=True, analyse=True)
            yield make("v6e", parts, constant=False, analyse=True)
        yield make("v6e", 2, constant=True, segments=True)
        yield make("v6e", 2, constant=True, channels=S5_IMAGE)
        yield make("v6e", 1, constant=False, dtype="bfloat16")
        for generation in ("v5e", "v5p", "v4", "tpu7x"):
            yield make(generation, 2, constant=False)


def _tpu_program(
    direction: str,
    generation: str,
    parts: int,
    *,
    constant: bool,
    dtype: str = "float32",
    channels: int = CHANNELS,
    segments: bool = False,
    analyse: bool = False,
) -> TpuProgram:
    def arguments(T: int) -> list[Any]:
        of_rule = numbers(1, T, channels, direction, parts, constant, dtype)
        ids = array(1, T, dtype="int32") if segments else None
        return [part for number in of_rule for part in number] + [ids]

    def rule(*inputs):
        *flat, ids = inputs
        of_rule = [tuple(flat[i : i + parts]) for i in range(0, len(flat), parts)]
        a, tokens, state, *cotangents = of_rule
        return getattr(pallas_tpu, direction)(a, tokens, state, ids, *cotangents)

    name = [
        "diagonal_scan",
        direction,
        "real" if parts == 1 else "complex",
        "constant" if constant else "per_token",
        dtype,
        str(channels),
        *(["segments"] if segments else []),
        generation,
    ]
    chunk = pallas_tpu.chunk_length(channels)
    return TpuProgram(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=rule,
        arguments=arguments,
        kernels=1,
        units=1,
        lengths=(2 * chunk, 4 * chunk),
        analyse=analyse,
    )


def gpu_programs() -> Iterator[GpuProgram]:
    for direction in ("forward", "backward"):
        for parts, constant, dtype, sizes, architecture in (
            (2, True, "float32", (8, 2048, 2048), "sm_90a"),
            (2, True, "float32", (8, 2048, 2048), "sm_80"),
            (2, False, "bfloat16", (8, 2048, 2048), "sm_90a"),
            (1, False, "bfloat16", (8, 2048, 2048), "sm_90a"),
            (1, True, "float32", (1, 1048576, 192), "sm_90a"),
        ):
            yield _gpu_program(direction, parts, constant, dtype, sizes, architecture)


def _gpu_program(
    direction: str,
    parts: int,
    constant: bool,
    dtype: str,
    sizes: tuple[int, int, int],
    architecture: str,
) -> GpuProgram:
    B, T, D = sizes

    def arguments() -> list[Any]:
        a, tokens, state, *cotangents = numbers(B, T, D, direction, parts, constant, dtype)
        return [a, tokens, state, array(B, T, dtype="int32"), *cotangents]

    kind = "real" if parts == 1 else "complex"
    factors = "constant" if constant else "per_token"
    return GpuProgram(
        name=f"diagonal_scan_{direction}_{kind}_{factors}_{dtype}_{B}x{T}x{D}_{architecture}",
        architecture=architecture,
        rule=getattr(pallas_gpu, direction),
        arguments=arguments,
    )
