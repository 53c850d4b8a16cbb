"""Short convolution: Mamba's size in both directions, dtypes and with segments; the unit is 1024
channels."""

from collections.abc import Iterator

from experiments.benchmarks.programs.program import GENERATIONS, Program, Shapes, shape
from ops.short_convolution import pallas_tpu as kernels

CHANNELS = 1024  # of a unit
WIDTH, TAPS = 2048, 4


def programs() -> Iterator[Program]:
    for direction in ("forward", "backward"):
        for generation in GENERATIONS:
            yield _program(generation, direction)
        yield _program("v6e", direction, dtype="float32")
        yield _program("v6e", direction, segments=True)


def _program(
    generation: str, direction: str, *, dtype: str = "bfloat16", segments: bool = False
) -> Program:
    def arguments(T: int) -> Shapes:
        x, state = shape(1, T, WIDTH, dtype=dtype), shape(1, TAPS - 1, WIDTH)
        ids = shape(1, T, dtype="int32") if segments else None
        cotangents = [] if direction == "forward" else [x, state]
        return [x, shape(TAPS, WIDTH), state, ids, *cotangents]

    def rule(*inputs):
        # The op's rules compute in float32 and cast at their ends, which are those of a kernel.
        outputs = getattr(kernels, direction)(*inputs)
        return outputs[0].astype(dtype), *outputs[1:]

    name = [
        "short_convolution",
        direction,
        dtype,
        f"{WIDTH}x{TAPS}",
        *(["segments"] if segments else []),
        generation,
    ]
    return Program(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=rule,
        arguments=arguments,
        kernels=1,
        units=WIDTH // CHANNELS,
        lengths=(1024, 2048),
        analyse=generation == "v6e",
    )
