"""Short convolution: Mamba's size in both directions, dtypes and with segments; of estimates the
unit is 1024 channels. It has no GPU kernel."""

from collections.abc import Iterator
from typing import Any

from experiments.benchmarks.ahead_of_time import GENERATIONS, TpuProgram, array
from ops.framework.examples import abstract_inputs
from ops.short_convolution import examples, pallas_tpu

CHANNELS = 1024  # of a unit
WIDTH, TAPS = 2048, 4


def tpu_programs() -> Iterator[TpuProgram]:
    for direction in ("forward", "backward"):
        for generation in GENERATIONS:
            yield _program(generation, direction)
        yield _program("v6e", direction, dtype="float32")
        yield _program("v6e", direction, segments=True)


def _program(
    generation: str, direction: str, *, dtype: str = "bfloat16", segments: bool = False
) -> TpuProgram:
    def arguments(T: int) -> list[Any]:
        sizes = {"batch": 1, "length": T, "width": WIDTH, "taps": TAPS}
        inputs = abstract_inputs(examples.inputs, sizes, "", dtype)
        x, w, state = inputs["x"], inputs["w"], array(1, TAPS - 1, WIDTH)
        ids = array(1, T, dtype="int32") if segments else None
        cotangents = [] if direction == "forward" else [x, state]
        return [x, w, state, ids, *cotangents]

    def rule(*inputs):
        # The op's rules compute in float32 and cast at their ends, which are those of a kernel.
        outputs = getattr(pallas_tpu, direction)(*inputs)
        return outputs[0].astype(dtype), *outputs[1:]

    name = [
        "short_convolution",
        direction,
        dtype,
        f"{WIDTH}x{TAPS}",
        *(["segments"] if segments else []),
        generation,
    ]
    return TpuProgram(
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
