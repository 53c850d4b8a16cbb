"""What the TPU kernels share: how work is cut into grid steps, how matmuls round, how heads are
interleaved.

**Layout.** Arrays stay as the caller has them, seen as [B, T, H * K]: heads lie side by side along
lanes, and a grid step (batch, block of heads, chunk) reads a rectangle of C tokens and a few heads.
That is how projections make them; nothing is transposed or padded in memory: rows past T are masked
inside the kernel, and a K that is no multiple of 128 is cut out of its lanes there.

**Precision.** A TPU's matrix unit multiplies bfloat16 and adds in float32. Float32 inputs take the
six-pass products (HIGHEST), bfloat16 inputs one pass; whatever is rounded for it is cast in plain
sight, so that interpreted kernels round as compiled ones do.

**Interleaving.** The compiler keeps the order of the source, and one head is a chain of small
matmuls that each wait for the one before. So a kernel writes one head as a generator that yields
wherever it would wait, and `interleave` takes turns between the heads."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Where a segment starts the decay is zero: a log that any sum of real ones leaves at exp(.) == 0
# exactly. It is only ever added to other logs, never subtracted.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class Tuning:
    """How much one grid step takes; chosen by the static cycle model of the TPU compiler for v5e
    and v6e.

    chunk: tokens, a power of two from 16 on. lanes: of the heads' keys or values in one step, where
    heads allow it: enough independent heads to fill the waiting times of each other, few enough for
    the chip's fast memory."""

    chunk: int = 128
    lanes: int = 512


@dataclass(frozen=True)
class Blocks:
    """The grid (batch, blocks of heads, chunks) of an op with q, k [B, T, HK, K] and v [B, T, H,
    V].

    heads, key_heads: per grid step; chunk: C. A step has all value heads of its key heads (group of
    them each), or heads of a single key head."""

    batch: int
    length: int
    all_heads: int
    all_key_heads: int
    key: int
    value: int
    heads: int
    key_heads: int
    chunk: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.all_heads // self.heads, self.chunks

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def group(self) -> int:
        """Value heads per key head inside one step."""
        return self.heads // self.key_heads

    @property
    def steps_per_key_head(self) -> int:
        """Blocks of heads that read the same key head; above one, the key head's gradient is a sum
        over steps."""
        return self.all_heads // self.heads * self.key_heads // self.all_key_heads

    def tokens(self, size: int, key_heads: bool = False, reverse: bool = False) -> pl.BlockSpec:
        """C tokens of the step's heads of [B, T, heads * size]."""
        heads = self.key_heads if key_heads else self.heads
        steps = self.steps_per_key_head if key_heads else 1
        return pl.BlockSpec(
            (1, self.chunk, heads * size),
            lambda b, h, t: (b, self._at(t, reverse), lax.div(h, jnp.int32(steps))),
        )

    def key_parts(self, reverse: bool = False) -> pl.BlockSpec:
        """C tokens of the step's own part of [B, T, key heads * steps per key head * K]."""
        size = self.key_heads * self.key
        return pl.BlockSpec((1, self.chunk, size), lambda b, h, t: (b, self._at(t, reverse), h))

    def rows(self, array: jax.Array | jax.ShapeDtypeStruct, reverse: bool = False) -> pl.BlockSpec:
        """One chunk of [B or 1, blocks of heads or 1, G or 1, ...]."""
        batch, blocks, chunks = (size > 1 for size in array.shape[:3])
        rest = array.shape[3:]
        return pl.BlockSpec(
            (1, 1, 1, *rest),
            lambda b, h, t: (
                b * batch,
                h * blocks,
                self._at(t, reverse) * chunks,
                *(0 for _ in rest),
            ),
        )

    def states(self, rows: int, columns: int) -> pl.BlockSpec:
        """The step's heads of [B, H, rows, columns]."""
        return pl.BlockSpec((1, self.heads, rows, columns), lambda b, h, t: (b, h, 0, 0))

    def chunk_states(self, rows: int, columns: int, reverse: bool = False) -> pl.BlockSpec:
        """The step's heads of [B, G, H, rows, columns]."""
        return pl.BlockSpec(
            (1, 1, self.heads, rows, columns), lambda b, h, t: (b, self._at(t, reverse), h, 0, 0)
        )

    def whole(self, array: jax.Array) -> pl.BlockSpec:
        """All of a constant, fetched once."""
        return pl.BlockSpec(array.shape, lambda b, h, t: (0,) * array.ndim)

    def _at(self, t: Any, reverse: bool) -> Any:
        return self.chunks - 1 - t if reverse else t


def cut(q: jax.Array, v: jax.Array, tuning: Tuning) -> Blocks:
    """Chooses the blocks for q [B, T, HK, K] and v [B, T, H, V].

    A block's lanes must be a multiple of 128 or everything; among the numbers of heads that allow
    this it takes the largest within `tuning.lanes`, else the smallest."""
    (batch, length, all_key_heads, key), (all_heads, value) = q.shape, v.shape[2:]
    group = all_heads // all_key_heads

    def whole_lanes(heads: int) -> bool:
        key_heads = max(1, heads // group)
        fits_keys = key_heads * key % LANES == 0 or key_heads == all_key_heads
        return fits_keys and (heads * value % LANES == 0 or heads == all_heads)

    candidates = [
        heads
        for heads in range(1, all_heads + 1)
        if all_heads % heads == 0
        and (heads % group == 0 or group % heads == 0)
        and whole_lanes(heads)
    ]
    small = [heads for heads in candidates if heads * max(key, value) <= tuning.lanes]
    heads = max(small) if small else min(candidates)
    chunk = min(tuning.chunk, max(16, 1 << (length - 1).bit_length()))
    return Blocks(
        batch, length, all_heads, all_key_heads, key, value, heads, max(1, heads // group), chunk
    )


def flat(x_BTHX: jax.Array) -> jax.Array:
    """[B, T, H, X] -> [B, T, H * X], which moves nothing."""
    return x_BTHX.reshape(*x_BTHX.shape[:2], -1)


def call(
    kernel: Callable[..., None],
    blocks: Blocks,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    scratch: Any,
    *,
    interpret: bool,
):
    """The outputs of `kernel`, run over the grid.

    inputs: pairs of array and block spec; outputs: pairs of shape and block spec. Chunks run in
    order on one core, batch and heads are independent."""
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)

    return pl.pallas_call(
        kernel,
        grid=blocks.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=scratch,
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    )(*arrays)


# The compiler's default of 16 MiB is for kernels that leave the fast memory to others; ours are
# alone in it.
VMEM_BYTES = 64 << 20


def interleave(heads: Iterable[Generator[None, None, None]]) -> None:
    """Runs one step of each generator in turn until all are done."""
    running = list(heads)
    while running:
        for head in tuple(running):
            try:
                next(head)
            except StopIteration:
                running.remove(head)


@dataclass(frozen=True)
class Matmul:
    """Products of matrices in `dtype` with sums in float32: nn = A B, nt = A B^T, tn = A^T B.

    fine: a float32 factor of a bfloat16 product enters as two terms, 16 bits together: two or three
    passes."""

    dtype: Any
    fine: bool = False

    @property
    def finer(self) -> "Matmul":
        return Matmul(self.dtype, fine=True)

    def _dot(self, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
        exact = self.dtype == jnp.float32

        def one(a: jax.Array, b: jax.Array) -> jax.Array:
            return lax.dot_general(
                a.astype(self.dtype),
                b.astype(self.dtype),
                (((a_axis,), (b_axis,)), ((), ())),
                precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )

        if not self.fine:
            return one(a, b)
        (a, *a_rest), (b, *b_rest) = (
            [x] if x.dtype == self.dtype else self.terms(x, 2) for x in (a, b)
        )
        product = one(a, b)
        for x in a_rest:
            product += one(x, b)
        for x in b_rest:
            product += one(a, x)
        return product

    def nn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 0)

    def nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 1, 1)

    def tn(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(a, b, 0, 0)

    def terms(self, x: jax.Array, count: int) -> list[jax.Array]:
        """x as `count` float32 terms, of 8 bits each but the last, which is the rest; [x] for
        float32 products.

        Against a matrix of zeros and ones, which bfloat16 holds exactly, two terms carry 16 bits of
        x through one-pass products. (Terms are cut off, not rounded: a cast to bfloat16 and back
        stops libtpu's cycle analysis on v5e.)"""
        x, terms = x.astype(jnp.float32), []
        for _ in range(0 if self.dtype == jnp.float32 else count - 1):
            bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
            terms.append(lax.bitcast_convert_type(bits, jnp.float32))
            x = x - terms[-1]
        return [*terms, x]

    def parts(self, x: jax.Array, count: int) -> jax.Array:
        """`terms` below each other, cast for a product."""
        terms = [term.astype(self.dtype) for term in self.terms(x, count)]
        return terms[0] if len(terms) == 1 else jnp.concatenate(terms, 0)


def matmul_dtype(*arrays: jax.Array) -> Any:
    """bfloat16 where all inputs are of at most that many bits; otherwise float32."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers [rows, columns]."""
    shape = (rows, columns)
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))  # pyright: ignore


def read(ref: Any, head: int, size: int, valid: jax.Array | None) -> jax.Array:
    """Head `head` [C, size] of a block [1, C, heads * size]; zeros where `valid` [C, 1] says that
    no token is."""
    x = ref[0, :, head * size : (head + 1) * size]
    return x if valid is None else jnp.where(valid, x.astype(jnp.float32), 0.0).astype(x.dtype)


def valid_rows(blocks: Blocks, chunk_index: jax.Array) -> jax.Array | None:
    """[C, 1], which rows of the chunk are tokens; None where all chunks are full."""
    if blocks.length % blocks.chunk == 0:
        return None
    return (
        chunk_index * blocks.chunk + lax.broadcasted_iota(jnp.int32, (blocks.chunk, 1), 0)
        < blocks.length
    )


def chunk_rows(x_BHT: jax.Array, blocks: Blocks) -> jax.Array:
    """[B, n heads, T] -> [B, n, G, heads, C] in float32, or [B, 1, G, 1, C] of one head for all.

    Padded with zeros. For small arrays only: it moves them.
    """
    batch, all_heads, length = x_BHT.shape
    heads = min(blocks.heads, all_heads)
    x = jnp.pad(
        x_BHT.astype(jnp.float32), ((0, 0), (0, 0), (0, blocks.chunks * blocks.chunk - length))
    )
    return x.reshape(batch, all_heads // heads, heads, blocks.chunks, blocks.chunk).transpose(
        0, 1, 3, 2, 4
    )


def from_chunk_rows(x: jax.Array, length: int) -> jax.Array:
    """[B, n, G, heads, C] -> [B, n heads, T]: inverse of `chunk_rows`."""
    batch, blocks, chunks, heads, chunk = x.shape
    x = x.transpose(0, 1, 3, 2, 4)
    return x.reshape(batch, blocks * heads, chunks * chunk)[:, :, :length]
