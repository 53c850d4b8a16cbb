"""Gated linear attention: every decay, direction and generation, head sizes from 16 to 256, grouped
heads, segments."""

import functools
from collections.abc import Iterator

from experiments.benchmarks.programs.program import TOKENS, Program, Shapes, shape
from ops.gated_linear_attention import pallas_tpu as kernels

# Key heads, heads, K, V.
USUAL = (4, 4, 128, 128)
OTHER_HEADS = ((4, 4, 64, 64), (4, 4, 96, 96), (2, 2, 16, 24), (2, 2, 256, 256), (1, 8, 128, 64))


def programs() -> Iterator[Program]:
    for generation in ("v6e", "v5e"):
        for direction in ("forward", "backward"):
            make = functools.partial(_program, generation, direction)
            for decay in ("none", "constant", "scalar", "vector"):
                # libtpu's cycle analysis (not its compiler) aborts on bfloat16 operands of the
                # other v5e programs.
                yield make(
                    decay, analyse=generation == "v6e" or decay == "none" or direction == "forward"
                )
            yield make("vector", decay_dtype="float32", analyse=generation == "v6e")
            for decay in ("scalar", "vector"):
                yield make(decay, dtype="float32", decay_dtype="float32")
                yield make(decay, segments=True)
            for heads in OTHER_HEADS:
                for decay in ("scalar", "vector"):
                    yield make(decay, heads=heads)
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
        ids = shape(1, T, dtype="int32") if segments else None
        cotangents = [] if direction == "forward" else [v, state]
        return [q, k, v, decay_log, state, ids, *cotangents]

    C = kernels.TUNING.chunk
    forward, backward = 2 * K * V + C * (K + V), 5 * K * V + C * (3 * K + 2 * V)
    name = [
        "gla",
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
        # Of the recurrence alone, without what decays add.
        matmul_flops=2.0 * TOKENS * (forward if direction == "forward" else backward),
        analyse=analyse,
    )
