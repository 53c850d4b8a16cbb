"""Gated linear attention: every decay, direction and device, head sizes from 16 to 256, grouped
heads, segments, walks in reverse, and on GPUs a million tokens."""

import functools
from collections.abc import Iterator

from experiments.benchmarks import matrix_states
from experiments.benchmarks.ahead_of_time import GpuProgram, TpuProgram
from ops.gated_linear_attention import examples, pallas_gpu, pallas_tpu


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
    for generation in ("v5p", "v4", "tpu7x"):
        for direction in ("forward", "backward"):
            for decay in ("none", "scalar", "vector"):
                yield program(generation, direction, decay)


def gpu_programs() -> Iterator[GpuProgram]:
    return matrix_states.gpu_programs("gla", examples, pallas_gpu)
