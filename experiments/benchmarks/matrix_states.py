"""Programs of the ops whose state is a matrix per head: what gated linear attention and the delta
rule have in common."""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from experiments.benchmarks.ahead_of_time import TOKENS, GpuProgram, TpuProgram, array
from ops.framework.examples import Shape, abstract_inputs

# Key heads, heads, K, V.
USUAL_HEADS = (4, 4, 128, 128)
OTHER_HEADS = ((4, 4, 64, 64), (4, 4, 96, 96), (2, 2, 16, 24), (2, 2, 256, 256), (1, 8, 128, 64))
# B, T, key heads, heads, K, V.
USUAL_SIZES = (4, 2048, 16, 16, 128, 128)
OTHER_SIZES = ((8, 1024, 8, 8, 64, 64), (8, 2048, 32, 32, 256, 256), (1, 8192, 2, 8, 96, 96))
# A million tokens, and half of them: what memory grows with.
LONG_SIZES = ((1, 524288, 8, 8, 128, 128), (1, 1048576, 8, 8, 128, 128))


def shape(B: int, T: int, HK: int, H: int, K: int, V: int) -> Shape:
    """Sizes as examples have them."""
    return {"batch": B, "length": T, "key_heads": HK, "heads": H, "key": K, "value": V}


def arguments(
    examples: ModuleType,
    sizes: Shape,
    direction: str,
    decay: str,
    dtype: str,
    decay_dtype: str,
    segments: bool,
    num_segments: int | None = None,
) -> list[Any]:
    """What a rule takes: the inputs, initial_state, segment_ids, and backward the cotangents of
    both outputs; decays per channel are of `decay_dtype`."""
    x = abstract_inputs(examples.inputs, sizes, decay, dtype)
    if decay == "vector":
        x["decay_log"] = array(*x["decay_log"].shape, dtype=decay_dtype)
    states = () if num_segments is None else (num_segments,)
    state = array(sizes["batch"], *states, sizes["heads"], sizes["key"], sizes["value"])
    ids = array(sizes["batch"], sizes["length"], dtype="int32") if segments else None
    inputs = [x[name] for name in ("q", "k", "v", "beta") if name in x]
    cotangents = [] if direction == "forward" else [x["v"], state]
    return [*inputs, x.get("decay_log"), state, ids, *cotangents]


def tpu_program(
    op: str,
    examples: ModuleType,
    rules: ModuleType,
    generation: str,
    direction: str,
    decay: str,
    *,
    dtype: str = "bfloat16",
    decay_dtype: str = "bfloat16",
    heads: tuple[int, int, int, int] = USUAL_HEADS,
    segments: bool = False,
    num_segments: int | None = None,
    reverse: bool = False,
    batch: int = 1,
    analyse: bool = False,
) -> TpuProgram:
    """The program of one rule of `rules`; `op` as it stands in names. num_segments: with a state
    for each. reverse: from the last token to the first."""
    HK, H, K, V = heads
    C = rules.TUNING.chunk
    static: dict[str, Any] = {"scale": K**-0.5, "reverse": reverse}
    if num_segments is not None:
        static["num_segments"] = num_segments
    name = [
        op,
        direction,
        f"{decay}_{decay_dtype}" if decay == "vector" else decay,
        dtype,
        f"{H}h" if H == HK else f"{HK}of{H}h",
        f"{K}x{V}",
        *(["segments"] if segments else []),
        *([] if num_segments is None else [f"{num_segments}states"]),
        *(["reverse"] if reverse else []),
        generation,
    ]
    return TpuProgram(
        name="_".join(name),
        generation=generation,
        direction=direction,
        rule=functools.partial(getattr(rules, direction), **static),
        arguments=lambda T: arguments(
            examples,
            shape(batch, T, *heads),
            direction,
            decay,
            dtype,
            decay_dtype,
            segments or num_segments is not None,
            num_segments,
        ),
        kernels=1 if direction == "forward" else 2,
        units=H,
        kept_bytes=lambda T: 0 if direction == "forward" else -(-T // C) * H * K * V * 4,
        matmul_flops=examples.matmul_flops(shape(1, TOKENS, 1, 1, K, V), direction, chunk=C),
        analyse=analyse,
    )


def published_tpu_programs(
    program: Callable[..., TpuProgram],
    published: Sequence[tuple[str, str, tuple[int, int, int, int]]],
) -> Iterator[TpuProgram]:
    """The programs of (decay, dtype, heads), which only have to compile. Two sequences: with one,
    the tiles of states need no second buffer."""
    for generation in ("v6e", "v5e", "v5p"):
        for direction in ("forward", "backward"):
            for decay, dtype, heads in published:
                decay_dtype = {"decay_dtype": dtype} if decay == "vector" else {}
                kind = {"dtype": dtype, "heads": heads, "batch": 2, **decay_dtype}
                yield program(generation, direction, decay, **kind)


def gpu_programs(op: str, examples: ModuleType, rules: ModuleType) -> Iterator[GpuProgram]:
    """Programs of every decay, size, dtype and architecture; `op` as it stands in names."""
    for direction in ("forward", "backward"):
        make = functools.partial(_gpu_program, op, examples, rules, direction)
        for decay in ("none", "constant", "scalar", "vector"):
            yield make(decay)
            yield make(decay, dtype="float32")
        for decay in ("none", "constant", "scalar"):
            yield make(decay, sizes=OTHER_SIZES[0], segments=True)
        for sizes in OTHER_SIZES:
            yield make("scalar", sizes=sizes)
            yield make("vector", sizes=sizes, segments=True)
        for decay in ("scalar", "vector"):
            yield make(decay, architecture="sm_80")
            for sizes in LONG_SIZES:
                yield make(decay, sizes=sizes)


def _gpu_program(
    op: str,
    examples: ModuleType,
    rules: ModuleType,
    direction: str,
    decay: str,
    *,
    dtype: str = "bfloat16",
    sizes: tuple[int, int, int, int, int, int] = USUAL_SIZES,
    segments: bool = False,
    architecture: str = "sm_90a",
) -> GpuProgram:
    B, T, HK, H, K, V = sizes
    name = [op, direction, decay, dtype, f"{B}x{T}", f"{HK}of{H}h", f"{K}x{V}"]
    return GpuProgram(
        name="_".join([*name, *(["segments"] if segments else []), architecture]),
        architecture=architecture,
        rule=functools.partial(getattr(rules, direction), scale=K**-0.5),
        arguments=lambda: arguments(
            examples, shape(*sizes), direction, decay, dtype, dtype, segments
        ),
    )
