"""The delta rule: every decay, direction and device, head sizes from 16 to 256, grouped heads,
segments, walks in reverse, and on GPUs a million tokens; on TPUs the heads of the largest models
that papers have."""

import functools
from collections.abc import Iterator

from experiments.benchmarks import matrix_states
from experiments.benchmarks.ahead_of_time import GpuProgram, TpuProgram
from ops.delta_rule import examples, pallas_gpu, pallas_tpu

# Of the largest models that were published.
PUBLISHED = (
    ("none", "bfloat16", (16, 16, 128, 128)),  # DeltaNet, 1.3B
    ("scalar", "bfloat16", (6, 6, 256, 512)),  # Gated DeltaNet, 1.3B
    ("vector", "bfloat16", (32, 32, 128, 128)),  # KDA, 48B
    # Beyond them: one head that does not fit as it is.
    ("scalar", "float32", (4, 4, 1024, 2048)),
)


def tpu_programs() -> Iterator[TpuProgram]:
    program = functools.partial(matrix_states.tpu_program, "delta", examples, pallas_tpu)
    for generation in ("v6e", "v5e"):
        for direction in ("forward", "backward"):
            make = functools.partial(program, generation, direction)
            for decay in ("none", "constant", "scalar", "vector"):
                # libtpu's cycle analysis (not its compiler) aborts on transposed bfloat16 operands
                # on v5e.
                yield make(decay, analyse=(generation, direction) != ("v5e", "backward"))
            # What only has to compile is divided between the generations.
            first, second = ("scalar", "vector")[:: 1 if generation == "v6e" else -1]
            yield make(first, dtype="float32", decay_dtype="float32")
            yield make(second, segments=True)
            for heads in matrix_states.OTHER_HEADS:
                yield make(second, heads=heads)
            for decay in ("scalar", "vector"):
                analyse = (generation, direction) != ("v5e", "backward")
                yield make(decay, reverse=True, analyse=analyse)
            yield make(first, heads=matrix_states.OTHER_HEADS[0], segments=True, reverse=True)
            # Not analysed: which blocks their index maps take is not known before they run.
            for decay in ("scalar", "vector"):
                yield make(decay, num_segments=5)
    for generation in ("v5p", "v4", "tpu7x"):
        for direction in ("forward", "backward"):
            for decay in ("none", "scalar", "vector"):
                yield program(generation, direction, decay)
    yield from matrix_states.published_tpu_programs(program, PUBLISHED)


def gpu_programs() -> Iterator[GpuProgram]:
    return matrix_states.gpu_programs("delta", examples, pallas_gpu)
