"""One Pallas kernel over a grid: its tiles, its references, and its independent chains of work (see
`ops/tpu/__init__.py`)."""

from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # columns of a register
SUBLANES = 8  # rows of a float32 register
# NOTE: the compiler's default of 16 MiB is for kernels that leave the fast memory to others; ours
# are alone in it.
VMEM_BYTES = 64 << 20

Ref = Any  # of Pallas: the tile of an array, or scratch memory, inside a kernel
Refs = TypeVar("Refs")  # the NamedTuple of one kernel


class Input(NamedTuple):
    """An array that a kernel reads, and which tile of it a grid step has."""

    array: jax.Array
    tile: pl.BlockSpec


class Output(NamedTuple):
    """Shape and dtype of an array that a kernel writes, and which tile of it a grid step has."""

    shape: jax.ShapeDtypeStruct
    tile: pl.BlockSpec


class Prefetched(NamedTuple):
    """An array of integers that index maps and a kernel read whole, from the scalar memory."""

    array: jax.Array


class Grid(Protocol):
    """dimensions: of each grid axis "parallel", or "arbitrary" where steps run in order on one
    core."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dimensions(self) -> tuple[Any, ...]: ...
    @property
    def interpret(self) -> bool: ...


def _is_tile(x: Any) -> bool:
    return isinstance(x, Input | Output | Prefetched)


def call(
    kernel: Callable[[Refs], None], grid: Grid, refs: Refs, first: tuple[str, ...] = ()
) -> Refs:
    """The results of a kernel over a grid: `refs` with an array at each `Output`, None elsewhere.

    refs: the kernel's NamedTuple, with an Input, an Output, scratch memory, Prefetched, None or a
    tuple of such at each field. Each kind is in the order of the fields, but for the inputs of the
    fields named in `first`. Index maps take the references of what is prefetched after the indices
    of the grid."""
    fields, tree = jax.tree.flatten(refs, is_leaf=_is_tile)
    moved = {
        id(x) for x in jax.tree.leaves([getattr(refs, name) for name in first], is_leaf=_is_tile)
    }
    inputs = [x for x in fields if isinstance(x, Input)]
    inputs = sorted(inputs, key=lambda x: id(x) not in moved)
    outputs = [x for x in fields if isinstance(x, Output)]
    prefetched = [x for x in fields if isinstance(x, Prefetched)]
    scratch = [x for x in fields if not _is_tile(x)]

    def on_refs(*refs: Ref) -> None:
        prefetched_refs, refs = iter(refs[: len(prefetched)]), refs[len(prefetched) :]
        of_input = dict(zip(map(id, inputs), refs[: len(inputs)], strict=True))
        out_refs = iter(refs[len(inputs) : len(inputs) + len(outputs)])
        scratch_refs = iter(refs[len(inputs) + len(outputs) :])
        in_refs = iter(of_input[id(x)] for x in fields if isinstance(x, Input))
        of_kind = {Input: in_refs, Output: out_refs, Prefetched: prefetched_refs}
        kernel(tree.unflatten([next(of_kind.get(type(x), scratch_refs)) for x in fields]))

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetched),
        grid=grid.shape,
        in_specs=[x.tile for x in inputs],
        out_specs=[x.tile for x in outputs],
        scratch_shapes=scratch,
    )
    results = pl.pallas_call(
        on_refs,
        grid_spec=spec,
        out_shape=[x.shape for x in outputs],
        interpret=grid.interpret,
        name=getattr(kernel, "func", kernel).__name__,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=grid.dimensions, vmem_limit_bytes=VMEM_BYTES
        ),
    )(*(x.array for x in (*prefetched, *inputs)))
    arrays = iter(results)
    return tree.unflatten([next(arrays) if isinstance(x, Output) else None for x in fields])


def interleave(chains: Iterable[Generator[None, None, None]]) -> None:
    """Runs one step of each generator in turn until all are done."""
    running = list(chains)
    while running:
        for chain in tuple(running):
            try:
                next(chain)
            except StopIteration:
                running.remove(chain)
