"""Tiles of GPU kernels: how they are loaded, stored and multiplied, and how a kernel is launched.

The kernels are written for Pallas' Triton lowering, which runs from Ampere on. A program of a
kernel holds tiles in registers. Every side of a tile is a power of two, at least 16 where the tile
enters a matmul; where an array is smaller, the rest of the tile is masked. The lowering has no
slices of values, no scratch memory and no order between programs: what is sequential is a loop
inside one program.

**Precision.** Tensor cores multiply bfloat16 and add in float32. Bfloat16 inputs enter matmuls as
they are; float32 intermediates are rounded to bfloat16 where they enter one; sums and states are
float32. Float32 inputs enter as sums of three bfloat16 terms, which hold all of their bits. That
takes six products in the place of one, the time of three TF32 products, which would keep 21 bits.
(A single TF32 product keeps 11, beyond the error budget of the ops; plain float32 products are too
slow.) Interpreted kernels round as compiled ones do.

**Lazy import.** jax has announced that it will remove this lowering. It is imported when a kernel
is traced; `available()` says whether it is there."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

MIN_TILE = 16  # the smallest side of a matmul
# Programs that fill a GPU: one and a half for each of the 132 multiprocessors of an H100 or H200.
# Not measured.
FILLING_PROGRAMS = 200


def available() -> bool:
    """Whether this jax still has Pallas' Triton lowering."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def triton() -> Any:
    return importlib.import_module("jax.experimental.pallas.triton")


def tile_size(n: int) -> int:
    """The smallest power of two that holds n, at least MIN_TILE."""
    return max(MIN_TILE, 1 << (n - 1).bit_length())


def call(
    name: str,
    kernel: Callable[[Any, Any], None],
    grid: tuple[int, ...],
    inputs: Any,
    outputs: Any,
    *,
    warps: int,
    interpret: bool,
) -> Any:
    """The outputs of `kernel(refs, out)`, which runs once for every index of the grid.

    inputs: a `NamedTuple` of arrays; outputs: one of `jax.ShapeDtypeStruct`s. Their fields may also
    be such tuples, or None. `refs` and `out` are the same tuples with references to whole arrays.
    Returned is a tuple like `outputs` with arrays."""
    (results,) = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[outputs],
        interpret=interpret,
        name=name,
        # NOTE: two stages: what the next step of a loop multiplies is copied to shared memory
        # during this one.
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=2),
    )(inputs)
    return results


@dataclass(frozen=True)
class Span:
    """Consecutive indices along one axis of an array."""

    index: jax.Array  # [n] int32
    valid: jax.Array | None  # [n] bool, which of them exist; None: all

    @property
    def size(self) -> int:
        return self.index.shape[0]


def span(start: Any, size: int, limit: int, whole: bool) -> Span:
    """The `size` indices from `start` on, of an axis that ends at `limit`.

    whole: whether no index can be beyond `limit`, whatever `start` is; known when the kernel is
    traced."""
    index = start + lax.iota(jnp.int32, size)
    return Span(index, None if whole else index < limit)


def reversed_span(start: Any, size: int, limit: int, whole: bool) -> Span:
    """`span`, counted from the other end of the axis: index i becomes limit - 1 - i."""
    index = limit - 1 - start - lax.iota(jnp.int32, size)
    if whole:
        return Span(index, None)
    # To the interpreter, which has no masks, a negative index would count from the end.
    return Span(jnp.where(index < 0, limit, index), index >= 0)


def load(ref: Any, *index: Any) -> jax.Array:
    """The tile of `ref` at scalars and one or two Spans; zero where an index is not valid."""
    indices, mask = _address(index)
    if mask is None:
        return triton().load(ref.at[indices])
    return triton().load(ref.at[indices], mask=mask, other=0)


def store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes `value`, cast to the dtype of `ref`, where `load` would read it."""
    indices, mask = _address(index)
    triton().store(ref.at[indices], value.astype(ref.dtype), mask=mask)


def _address(index: Sequence[Any]) -> tuple[tuple[Any, ...], jax.Array | None]:
    """The index of each axis, Spans broadcast against each other, and the mask (None: no mask)."""
    shape = tuple(x.size for x in index if isinstance(x, Span))
    indices, mask, axis = [], None, 0
    for x in index:
        if not isinstance(x, Span):
            indices.append(x)
            continue
        indices.append(lax.broadcast_in_dim(x.index, shape, (axis,)))
        if x.valid is not None:
            valid = lax.broadcast_in_dim(x.valid, shape, (axis,))
            mask = valid if mask is None else mask & valid
        axis += 1
    return tuple(indices), mask


@dataclass(frozen=True)
class Matmul:
    """Products of tiles with float32 sums: nn = A B, nt = A B^T, tn = A^T B.

    A bfloat16 factor enters as it is, a float32 factor as a sum of bfloat16 terms."""

    dtype: Any  # of the op's inputs: bfloat16 or float32, whose factors enter in three terms
    fine: bool = False  # with bfloat16 inputs: a float32 factor enters in two terms, not in one

    def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
        a_terms, b_terms = (self._terms(x) for x in (a, b))
        # The product of terms i and j is 2^(-8 (i + j)) of the whole: from `count` on it is lost
        # in the rounding of the last term. The smallest products are added first.
        count = max(len(a_terms), len(b_terms))
        pairs = [(i, j) for i in range(len(a_terms)) for j in range(len(b_terms)) if i + j < count]
        total = None
        for i, j in sorted(pairs, key=sum, reverse=True):
            product = lax.dot_general(
                a_terms[i],
                b_terms[j],
                (((a_axis,), (b_axis,)), ((), ())),
                precision=lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )
            total = product if total is None else total + product
        assert total is not None
        return total

    def _terms(self, x: jax.Array) -> list[jax.Array]:
        """x as a sum of bfloat16 numbers, the largest first."""
        if x.dtype == jnp.bfloat16:
            return [x]
        count = 3 if self.dtype == jnp.float32 else 2 if self.fine else 1
        terms = []
        for _ in range(count):
            terms.append(x.astype(jnp.bfloat16))
            x = x - terms[-1].astype(jnp.float32)
        return terms

    def nn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 0)

    def nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 1)

    def tn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 0, 0)

    def masked_sums(self, mask: jax.Array, x: jax.Array) -> jax.Array:
        """[R, X] float32: row r is the sum of the rows c of x [C, X] with mask[r, c].

        mask: [R, C] bool. x enters in terms of 8 bits, whose products with zeros and ones are exact
        in bfloat16: three terms are all of float32, two have twice the bits of bfloat16 inputs."""
        return replace(self, fine=True).nn(mask.astype(jnp.bfloat16), x)


def matmul_dtype(*arrays: jax.Array) -> Any:
    """The dtype of `Matmul`: bfloat16 where all arrays are, otherwise float32."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row index and the column index of each element, both [rows, columns] int32."""
    return (
        lax.broadcasted_iota(jnp.int32, (rows, columns), 0),
        lax.broadcasted_iota(jnp.int32, (rows, columns), 1),
    )


def zeros(*sizes: int) -> jax.Array:
    return jnp.zeros(sizes, jnp.float32)


def tiling(size: int, max_width: int) -> tuple[int, int]:
    """The width of a tile, at most `max_width`, and how many such tiles cover `size`."""
    width = min(tile_size(size), max_width)
    return width, pl.cdiv(size, width)


def split_time(chunks: int, programs: int) -> int:
    """The number of parts into which `chunks` chunks are cut; programs: how many there are for
    each part.

    Every part after the first costs another pass over its keys and values; no part is shorter than
    eight chunks."""
    parts = 1
    while parts * programs < FILLING_PROGRAMS and chunks >= 16 * parts:
        parts *= 2
    return parts


def part_starts(
    multiply: Callable[[Any, Any], Any],
    factors: Any,
    increments: Any,
    initial_state: Any,
    reverse: bool,
) -> Any:
    """The states that enter the parts, a tree like `increments`, of arrays [B, parts, ...].

    A part maps S to multiply(factor, S) + increment. factors, increments: trees of arrays
    [B, parts, ...]; initial_state: a tree of [B, 1, ...], the state that enters the first part.
    reverse: time runs from the last part to the first, and the initial state enters the last.
    """

    def step(S: Any, part: Any) -> Any:
        factor, increment = part
        return jax.tree.map(jnp.add, multiply(factor, S), increment), S

    parts = jax.tree.map(lambda x: x.swapaxes(0, 1), (factors, increments))
    first = jax.tree.map(lambda x: x[:, 0], initial_state)
    _, starts = lax.scan(step, first, parts, reverse=reverse)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), starts)
