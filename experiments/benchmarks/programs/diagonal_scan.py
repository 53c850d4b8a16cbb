"""Diagonal scan: real and complex, constant factors and one per token; the unit is 1024 (complex)
channels."""

import functools
from collections.abc import Iterator

from experiments.benchmarks.programs.program import Program, Shapes, shape
from ops.diagonal_scan import pallas_tpu as kernels

CHANNELS = 1024  # of a unit
S5_IMAGE = 192  # channels that are no whole tiles


def programs() -> Iterator[Program]:
    for direction in ("forward", "backward"):
        make = functools.partial(_program, direction)
        for parts in (1, 2):
            yield make("v6e", parts, constant=True, analyse=True)
            yield make("v6e", parts, constant=False, analyse=True)
        yield make("v6e", 2, constant=True, segments=True)
        yield make("v6e", 2, constant=True, channels=S5_IMAGE)
        yield make("v6e", 1, constant=False, dtype="bfloat16")
        for generation in ("v5e", "v5p", "v4", "tpu7x"):
            yield make(generation, 2, constant=False)


def _program(
    direction: str,
    generation: str,
    parts: int,
    *,
    constant: bool,
    dtype: str = "float32",
    channels: int = CHANNELS,
    segments: bool = False,
    analyse: bool = False,
) -> Program:
    def arguments(T: int) -> Shapes:
        b = shape(1, T, channels, dtype=dtype)
        a = shape(channels) if constant else b
        state = shape(1, channels)
        ids = shape(1, T, dtype="int32") if segments else None
        # Backward takes states in the place of b; they and their cotangent are float32.
        h = shape(1, T, channels)
        numbers = [a, b, state] if direction == "forward" else [a, h, state, h, state]
        return [x for x in numbers for _ in range(parts)] + [ids]

    def rule(*inputs):
        *flat, ids = inputs
        numbers = [tuple(flat[i : i + parts]) for i in range(0, len(flat), parts)]
        a, tokens, state, *cotangents = numbers
        return getattr(kernels, direction)(a, tokens, state, ids, *cotangents)

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
    chunk = kernels.chunk_length(channels)
    return Program(
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
