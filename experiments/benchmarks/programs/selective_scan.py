"""Selective scan: Mamba's sizes in both directions, ranges and dtypes, with its gate and step
sizes, with segments.

Backward takes the states at the starts of chunks that forward keeps, "training" in the name, where
both do so. The unit is 1024 channels."""

import functools
from collections.abc import Iterator

from experiments.benchmarks.programs.program import Program, Shapes, shape
from ops.selective_scan import gating
from ops.selective_scan import pallas_tpu as kernels

CHANNELS = 1024  # of a unit
MAMBA = (2048, 16)  # D, N
OTHER_SIZES = ((5120, 16), (768, 64), (200, 5))


def programs() -> Iterator[Program]:
    for direction in ("forward", "backward"):
        make = functools.partial(_program, direction)
        yield make("v6e", analyse=True)
        yield make("v6e", gated=True, analyse=True)
        yield make("v6e", dtype="float32", analyse=True)
        yield make("v6e", negative=True, analyse=True)
        yield make("v6e", segments=True, analyse=True)
        for sizes in OTHER_SIZES:
            yield make("v6e", sizes=sizes, analyse=sizes[1] > gating.MAX_KEPT_STATES)
        for generation in ("v5e", "v5p", "v4", "tpu7x"):
            yield make(generation)
        yield make("v5e", gated=True)
    for gated in (False, True):
        yield _program("forward", "v6e", gated=gated, training=True, analyse=True)
    yield _program("forward", "v5e", gated=True, training=True)


def _program(
    direction: str,
    generation: str,
    *,
    dtype: str = "bfloat16",
    sizes: tuple[int, int] = MAMBA,
    negative: bool = False,
    gated: bool = False,
    segments: bool = False,
    training: bool = False,
    analyse: bool = False,
) -> Program:
    D, N = sizes
    forward, keeps = direction == "forward", N <= gating.MAX_KEPT_STATES

    def arguments(T: int) -> Shapes:
        x = delta = shape(1, T, D, dtype=dtype)
        B = C = shape(1, T, N, dtype=dtype)
        state = shape(1, D, N)
        ids = shape(1, T, dtype="int32") if segments else None
        gate = [x, shape(D)] if gated else [None, None]
        inputs = [x, delta, shape(D, N), B, C, shape(D), *gate, state, ids]
        kept = shape(1, -(-T // gating.CHUNK), N, D) if keeps else None
        return inputs if forward else [*inputs, kept, x, state]

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
    return Program(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=functools.partial(
            getattr(kernels, direction),
            delta_softplus=gated,
            eigenvalue_range=(-1, 1) if negative else (0, 1),
            **({"with_chunk_states": training} if forward else {}),
        ),
        arguments=arguments,
        kernels=1 if forward or keeps else 2,
        units=max(1, D // CHANNELS),
        kept_bytes=lambda T: (
            0 if forward or keeps else -(-T // kernels.backward_chunk(N)) * D * N * 4
        ),
        analyse=analyse,
    )
