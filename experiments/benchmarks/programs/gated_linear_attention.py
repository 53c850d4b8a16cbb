"""Gated linear attention: every decay, direction and device, head sizes from 16 to 256, grouped
heads, segments, walks in reverse, and on GPUs a million tokens; on TPUs the heads of the largest
models that papers have."""

import functools
from collections.abc import Iterator

from experiments.benchmarks import matrix_states
from experiments.benchmarks.ahead_of_time import GpuProgram, TpuProgram
from ops.gated_linear_attention import examples, pallas_gpu, pallas_tpu

# Of the largest models that were published.
PUBLISHED = (
    ("none", "float32", (16, 16, 153, 129)),  # Based, 1.3B
    ("none", "float32", (32, 32, 256, 129)),  # Hedgehog, 7B
    ("constant", "bfloat16", (16, 16, 256, 512)),  # RetNet, 6.7B
    ("vector", "bfloat16", (4, 4, 256, 512)),  # GLA, 1.3B
    ("scalar", "float32", (1, 80, 128, 64)),  # Mamba-2, 2.7B
    # Beyond them: one head that does not fit as it is.
    ("vector", "bfloat16", (4, 4, 1024, 2048)),
)


def tpu_programs() -> Iterator[TpuProgram]:
    program = functools.partial(matrix_states.tpu_program, "gla", examples, pallas_tpu)
    for generation in ("v6e", "v5e"):
        for direction in ("forward", "backward"):
            make = functools.partial(program, generation, direction)
            for decay in ("none", "constant", "scalar", "vector"):
                # libtpu's cycle analysis (not its compiler) aborts on bfloat16 operands of the
                # other v5e programs.
                analyse = generation == "v6e" or decay == "none" or direction == "forward"
                yield make(decay, analyse=analyse)
            yield make("vector", decay_dtype="float32", analyse=generation == "v6e")
            for decay in ("scalar", "vector"):
                yield make(decay, dtype="float32", decay_dtype="float32")
                yield make(decay, segments=True)
            for heads in matrix_states.OTHER_HEADS:
                for decay in ("scalar", "vector"):
                    yield make(decay, heads=heads)
            for decay in ("scalar", "vector"):
                analyse = generation == "v6e" or direction == "forward"
                yield make(decay, reverse=True, analyse=analyse)
            yield make("vector", heads=matrix_states.OTHER_HEADS[0], segments=True, reverse=True)
            # Not analysed: which blocks their index maps take is not known before they run.
            for decay in ("scalar", "vector"):
                yield make(decay, num_segments=5)
    for generation in ("v5p", "v4", "tpu7x"):
        for direction in ("forward", "backward"):
            for decay in ("none", "scalar", "vector"):
                yield program(generation, direction, decay)
    yield from matrix_states.published_tpu_programs(program, PUBLISHED)


def gpu_programs() -> Iterator[GpuProgram]:
    return matrix_states.gpu_programs("gla", examples, pallas_gpu)
