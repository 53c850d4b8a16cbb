"""What the GPU kernels share: loads and stores by index, how matmuls round, sums over intervals of tokens.

The kernels are written for Pallas' Triton lowering, which runs from Ampere on. A program of a kernel holds tiles in
registers; every size of a tile is a power of two, at least 16 where it enters a matmul, and what an array lacks of it
is masked. The lowering has no slices of values, no scratch memory and no order between programs: what is sequential is
a loop inside one program.

**Precision.** Bfloat16 inputs enter matmuls as they are and everything computed is rounded to bfloat16 where it enters
one; sums and states are float32. Float32 inputs take three TF32 products for one (about 21 bits; plain float32 when
interpreted, where no tensor core is imitated): single TF32 products, 11 bits, are outside the error budget of the ops.

**Lazy import.** jax has announced that it will remove this lowering. It is imported when a kernel is traced;
`available()` says whether it is there.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .by_platform import by_platform

MIN_TILE = 16  # the smallest side of a matmul
MAX_ELEMENTS = 1 << 31  # of one array: what 32-bit offsets reach
# Programs that fill a GPU: one and a half for each of the 132 multiprocessors of an H100 or H200. Not measured.
FILLING_PROGRAMS = 200


def available() -> bool:
    """Whether this jax still has Pallas' Triton lowering."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _triton() -> Any:
    return importlib.import_module("jax.experimental.pallas.triton")


def tile_size(n: int) -> int:
    """The smallest power of two that holds n, at least MIN_TILE."""
    return max(MIN_TILE, 1 << (n - 1).bit_length())


def call(
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    warps: int,
    stages: int = 2,
) -> Any:
    """Runs `kernel(*inputs, *outputs, compiled=...)`, refs of whole arrays, for every place of the grid.

    Compiled when lowered for CUDA, interpreted when lowered for a CPU. An input may be None.
    """

    def run(*inputs: Any, interpret: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, compiled=not interpret),
            grid=grid,
            out_shape=tuple(outputs),
            interpret=interpret,
            name=name,
            compiler_params=_triton().CompilerParams(
                num_warps=warps, num_stages=stages
            ),
        )(*inputs)

    return by_platform(
        {
            "cuda": functools.partial(run, interpret=False),
            "cpu": functools.partial(run, interpret=True),
        },
        *inputs,
    )


@dataclass(frozen=True)
class Span:
    """Consecutive places along one axis of an array: index [n], and which of them exist (None: all)."""

    index: jax.Array
    valid: jax.Array | None

    @property
    def size(self) -> int:
        return self.index.shape[0]


def span(start: Any, size: int, limit: int, whole: bool) -> Span:
    """`size` places from `start`; whole: static, no place is beyond `limit`, wherever it starts."""
    index = start + lax.iota(jnp.int32, size)
    return Span(index, None if whole else index < limit)


def load(ref: Any, *index: Any) -> jax.Array:
    """The tile of `ref` at scalars and one or two Spans, zero where a Span has no place."""
    at, mask = _address(index)
    if mask is None:
        return _triton().load(ref.at[at])
    return _triton().load(ref.at[at], mask=mask, other=0)


def store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes a tile where `load` would read it, in the dtype of `ref`."""
    at, mask = _address(index)
    _triton().store(ref.at[at], value.astype(ref.dtype), mask=mask)


def _address(index: Sequence[Any]) -> tuple[tuple[Any, ...], jax.Array | None]:
    spans = [x for x in index if isinstance(x, Span)]
    shape = tuple(x.size for x in spans)
    at, mask, axis = [], None, 0
    for x in index:
        if not isinstance(x, Span):
            at.append(x)
            continue
        at.append(lax.broadcast_in_dim(x.index, shape, (axis,)))
        if x.valid is not None:
            valid = lax.broadcast_in_dim(x.valid, shape, (axis,))
            mask = valid if mask is None else mask & valid
        axis += 1
    return tuple(at), mask


@dataclass(frozen=True)
class Matmul:
    """Products of tiles with float32 sums: nn = A B, nt = A B^T, tn = A^T B.

    dtype: of the inputs, bfloat16 or float32; compiled: for a GPU, not interpreted.
    """

    dtype: Any
    compiled: bool

    def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
        if self.dtype == jnp.bfloat16:
            precision = lax.Precision.DEFAULT
        elif self.compiled:
            precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        else:
            precision = lax.Precision.HIGHEST
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (((a_axis,), (b_axis,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def nn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 0)

    def nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 1)

    def tn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 0, 0)

    def sums(self, which: jax.Array, x: jax.Array) -> jax.Array:
        """For each row of `which` [R, C] bool the sum of those rows of x [C, X], float32.

        x enters in terms of 8 bits, which a bfloat16 product with zeros and ones leaves exact: three terms are all of
        float32, two are twice the bits of bfloat16 inputs.
        """
        which = which.astype(jnp.bfloat16)
        x, total = x.astype(jnp.float32), None
        for _ in range(2 if self.dtype == jnp.bfloat16 else 3):
            term = x.astype(jnp.bfloat16)
            part = lax.dot_general(
                which,
                term,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            total = part if total is None else total + part
            x = x - term.astype(jnp.float32)
        assert total is not None
        return total


def matmul_dtype(*arrays: jax.Array) -> Any:
    """bfloat16 where all inputs are; otherwise float32."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers [rows, columns]."""
    return (
        lax.broadcasted_iota(jnp.int32, (rows, columns), 0),
        lax.broadcasted_iota(jnp.int32, (rows, columns), 1),
    )


def split_time(chunks: int, programs: int) -> int:
    """In how many parts to cut `chunks` chunks where `programs` programs run beside each other without.

    Every part after the first costs another pass over its keys and values; no part is shorter than eight chunks.
    """
    parts = 1
    while parts * programs < FILLING_PROGRAMS and chunks >= 16 * parts:
        parts *= 2
    return parts
