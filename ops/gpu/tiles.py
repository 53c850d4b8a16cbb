"""What the GPU kernels share: loads and stores by index, how matmuls round, sums over intervals of
tokens.

The kernels are written for Pallas' Triton lowering, which runs from Ampere on. A program of a
kernel holds tiles in registers; every size of a tile is a power of two, at least 16 where it enters
a matmul, and what an array lacks of it is masked. The lowering has no slices of values, no scratch
memory and no order between programs: what is sequential is a loop inside one program.

**Precision.** Tensor cores multiply bfloat16 and add in float32. Bfloat16 inputs enter matmuls as
they are, and what is computed from them in float32 is rounded where it enters one; sums and states
are float32. Float32 numbers enter as sums of three bfloat16 ones, all of their bits: six products
for one, the time of three TF32 products, which would keep 21 bits. (A single TF32 product keeps 11,
beyond the error budget of the ops; plain float32 ones are too slow.) Interpreted kernels round as
compiled ones do.

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
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    warps: int,
    *,
    interpret: bool,
) -> Any:
    """The outputs of `kernel(*inputs, *outputs)`, called with refs of whole arrays for every place
    of the grid.

    Inputs and outputs may be trees, and None in them."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=tuple(outputs),
        interpret=interpret,
        name=name,
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=2),
    )(*inputs)


@dataclass(frozen=True)
class Span:
    """Consecutive places along one axis of an array: index [n], and which of them exist (None:
    all)."""

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
        return triton().load(ref.at[at])
    return triton().load(ref.at[at], mask=mask, other=0)


def store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes a tile where `load` would read it, in the dtype of `ref`."""
    at, mask = _address(index)
    triton().store(ref.at[at], value.astype(ref.dtype), mask=mask)


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

    dtype: of the inputs, bfloat16 or float32. fine: beside bfloat16 inputs, factors computed in
    float32 enter in two terms, 16 bits, in place of one."""

    dtype: Any
    fine: bool = False

    def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
        of_a, of_b = (self._terms(x) for x in (a, b))
        pairs = [(i, j) for i in range(len(of_a)) for j in range(len(of_b))]
        most = max(len(of_a), len(of_b))  # what two last terms make is beyond them
        total = None
        for i, j in sorted((x for x in pairs if sum(x) < most), key=sum, reverse=True):
            part = lax.dot_general(
                of_a[i],
                of_b[j],
                (((a_axis,), (b_axis,)), ((), ())),
                precision=lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )
            total = part if total is None else total + part
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

    def sums(self, which: jax.Array, x: jax.Array) -> jax.Array:
        """For each row of `which` [R, C] bool the sum of those rows of x [C, X], float32.

        x enters in terms of 8 bits, which a bfloat16 product with zeros and ones leaves exact:
        three terms are all of float32, two are twice the bits of bfloat16 inputs."""
        return replace(self, fine=True).nn(which.astype(jnp.bfloat16), x)


def matmul_dtype(*arrays: jax.Array) -> Any:
    """bfloat16 where all inputs are; otherwise float32."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers [rows, columns]."""
    return (
        lax.broadcasted_iota(jnp.int32, (rows, columns), 0),
        lax.broadcasted_iota(jnp.int32, (rows, columns), 1),
    )


def zeros(*sizes: int) -> jax.Array:
    return jnp.zeros(sizes, jnp.float32)


def divided(size: int, most: int) -> tuple[int, int]:
    """The width of a tile, at most `most`, and how many cover `size`."""
    width = min(tile_size(size), most)
    return width, pl.cdiv(size, width)


def split_time(chunks: int, programs: int) -> int:
    """In how many parts to cut `chunks` chunks where `programs` programs run beside each other
    without.

    Every part after the first costs another pass over its keys and values; no part is shorter than
    eight chunks."""
    parts = 1
    while parts * programs < FILLING_PROGRAMS and chunks >= 16 * parts:
        parts *= 2
    return parts


def part_starts(
    multiply: Callable[[Any, Any], Any], products: Any, added: Any, entering: Any, reverse: bool
) -> Any:
    """States that enter the parts, numbers of arrays [B, parts, ...] as products and added;
    entering: [B, 1, ...].

    S' = product S + added from part to part, from the last to the first in reverse.
    """

    def step(S: Any, part: Any) -> Any:
        product, added = part
        return jax.tree.map(jnp.add, multiply(product, S), added), S

    parts = jax.tree.map(lambda x: x.swapaxes(0, 1), (products, added))
    entering = jax.tree.map(lambda x: x[:, 0], entering)
    _, starts = lax.scan(step, entering, parts, reverse=reverse)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), starts)
