"""The delta rule: every decay, direction and generation, head sizes from 16 to 256, grouped heads,
segments."""

import functools
from collections.abc import Iterator

from experiments.benchmarks.programs.program import TOKENS, Program, Shapes, shape
from ops.delta_rule import pallas_tpu as kernels

# Key heads, heads, K, V.
USUAL = (4, 4, 128, 128)
OTHER_HEADS = ((4, 4, 64, 64), (4, 4, 96, 96), (2, 2, 16, 24), (2, 2, 256, 256), (1, 8, 128, 64))


def programs() -> Iterator[Program]:
    for generation in ("v6e", "v5e"):
        for direction in ("forward", "backward"):
            make = functools.partial(_program, generation, direction)
            for decay in ("none", "constant", "scalar", "vector"):
                # libtpu's cycle analysis (not its compiler) aborts on transposed bfloat16 operands
                # on v5e.
                yield make(decay, analyse=(generation, direction) != ("v5e", "backward"))
            # What only has to compile is divided between the generations.
            first, second = ("scalar", "vector")[:: 1 if generation == "v6e" else -1]
            yield make(first, dtype="float32", decay_dtype="float32")
            yield make(second, segments=True)
            for heads in OTHER_HEADS:
                yield make(second, heads=heads)
    for generation in ("v5p", "v4", "tpu7x"):
        for direction in ("forward", "backward"):
            for decay in ("none", "scalar", "vector"):
                yield _program(generation, direction, decay)


def _program(
    generation: str,
    direction: str,
    decay: str,
    *,
    dtype: str = "bfloat16",
    decay_dtype: str = "bfloat16",
    heads: tuple[int, int, int, int] = USUAL,
    segments: bool = False,
    analyse: bool = False,
) -> Program:
    HK, H, K, V = heads

    def arguments(T: int) -> Shapes:
        decay_log = {
            "none": None,
            "constant": shape(H),
            "scalar": shape(1, T, H),
            "vector": shape(1, T, H, K, dtype=decay_dtype),
        }[decay]
        state = shape(1, H, K, V)
        q = k = shape(1, T, HK, K, dtype=dtype)
        v = shape(1, T, H, V, dtype=dtype)
        beta = shape(1, T, H, dtype=dtype)
        ids = shape(1, T, dtype="int32") if segments else None
        cotangents = [] if direction == "forward" else [v, state]
        return [q, k, v, beta, decay_log, state, ids, *cotangents]

    C = kernels.TUNING.chunk
    writes = C * (2 * K + V) + K * V  # KK, W, U and W S
    forward = writes + 2 * K * V + C * (K + V)
    states, backward = writes + K * V, writes + 7 * K * V + C * (5 * K + 4 * V)
    name = [
        "delta",
        direction,
        f"{decay}_{decay_dtype}" if decay == "vector" else decay,
        dtype,
        f"{H}h" if H == HK else f"{HK}of{H}h",
        f"{K}x{V}",
        *(["segments"] if segments else []),
        generation,
    ]
    return Program(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=functools.partial(getattr(kernels, direction), scale=K**-0.5),
        arguments=arguments,
        kernels=1 if direction == "forward" else 2,
        units=H,
        kept_bytes=lambda T: 0 if direction == "forward" else -(-T // C) * H * K * V * 4,
        # Of the recurrence alone, without what decays and inverses add.
        matmul_flops=2.0 * TOKENS * (forward if direction == "forward" else states + backward),
        analyse=analyse,
    )
