"""One pass of one op, as an ahead-of-time compiler takes it, for a TPU or for a GPU.

`experiments/benchmarks/programs/<op>.py` has the programs of an op: `tpu_programs()` if it has TPU
kernels, `gpu_programs()` if it has GPU kernels. A file that is put there is found."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# All that compile; the report's cycles are of the first two (libtpu's analysis aborts on the
# others).
GENERATIONS = ("v6e", "v5e", "v5p", "v4", "tpu7x")
TOKENS = 64  # estimates are given per this many tokens, and per head or per block of channels

Shapes = Sequence[jax.ShapeDtypeStruct | None]


@dataclass(frozen=True)
class TpuProgram:
    """rule(*arguments(length)) at batch one.

    direction: "forward" or "backward", of `kernels` kernels. arguments: shapes at a length, None
    where an optional input is absent. units: how many heads (or blocks of channels) the estimate is
    divided by. kept_bytes: what a backward pass must write and read besides inputs and outputs,
    such as states at the starts of chunks.
    matmul_flops: of the recurrence per unit and 64 tokens, None where there are no matmuls.
    lengths: two, for the slope. analyse: ask for cycles."""

    name: str
    generation: str
    direction: str
    rule: Callable[..., Any]
    arguments: Callable[[int], Shapes]
    kernels: int
    units: int
    kept_bytes: Callable[[int], int] = lambda length: 0
    matmul_flops: float | None = None
    lengths: tuple[int, int] = (256, 512)
    analyse: bool = True

    def function_and_shapes(self, length: int) -> tuple[Callable[..., Any], Shapes]:
        """The pass at T = `length`, and its arguments as projections make and take them, [B, T, H *
        K].

        As arguments, separate heads would cost a relayout, which no model pays.
        """
        arguments = self.arguments(length)

        def run(*inputs: Any) -> Any:
            whole = [
                x if like is None else x.reshape(like.shape)
                for x, like in zip(inputs, arguments, strict=True)
            ]
            outputs = jax.tree.leaves(self.rule(*whole))
            return [y.reshape(_flat_shape(y, length)) for y in outputs]

        return run, [
            x if x is None else jax.ShapeDtypeStruct(_flat_shape(x, length), x.dtype)
            for x in arguments
        ]


@dataclass(frozen=True)
class GpuProgram:
    """rule(*arguments()), for "sm_90a" (H100, H200) or "sm_80" (A100)."""

    name: str
    architecture: str
    rule: Callable[..., Any]
    arguments: Callable[[], Sequence[Any]]


def tpu_programs() -> Iterator[TpuProgram]:
    """Programs of all ops for TPUs: what the report and `make test-all` compile."""
    return _programs("tpu_programs")


def gpu_programs() -> Iterator[GpuProgram]:
    """Programs of all ops for GPUs: what the report and `make test-all` compile."""
    return _programs("gpu_programs")


def _programs(kind: str) -> Iterator[Any]:
    for file in sorted((Path(__file__).parent / "programs").glob("*.py")):
        module = importlib.import_module(f"experiments.benchmarks.programs.{file.stem}")
        yield from getattr(module, kind, tuple)()


def array(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """An array of which only shape and dtype are known."""
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def _flat_shape(x: Any, length: int) -> tuple[int, ...]:
    """[B, T, H, K] -> [B, T, H * K], other shapes (of states, say) as they are."""
    sizes: tuple[int, ...] = tuple(x.shape)
    if len(sizes) == 4 and sizes[1] == length:
        return (*sizes[:2], sizes[2] * sizes[3])
    return sizes
