"""Chunks of ops with a matrix state: their sizes, and what a kernel reads of each."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import tiles as gpu
from .decay import Segments, TokenDecay, load_segments, token_decay

# The registers of a program hold a tile of the state of so many numbers beside a chunk's matmuls.
STATE_NUMBERS = {jnp.dtype(jnp.bfloat16): 8192, jnp.dtype(jnp.float32): 4096}


def chunk_length(length: int) -> int:
    """C: 64, the rows of Hopper's matmuls, or less for shorter sequences."""
    return min(64, gpu.tile_size(length))


@dataclass(frozen=True)
class Sizes:
    """What is static in a call."""

    batch: int
    length: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: Any  # of matmuls, `tiles.matmul_dtype`
    scale: float  # factor that the kernels must still apply to scores and reads
    reverse: bool  # time runs from the last token to the first
    interpret: bool

    @property
    def chunks(self) -> int:
        """G."""
        return pl.cdiv(self.length, self.chunk)

    @property
    def rows(self) -> int:
        """G C, the padded rows."""
        return self.chunks * self.chunk

    @property
    def warps(self) -> int:
        """Warps of a program with tiles of 64 x 64; three products for one take twice the
        registers."""
        return 4 if self.dtype == jnp.bfloat16 else 8

    @property
    def state_width(self) -> int:
        """Value channels of the state that a program holds, all key channels of each."""
        numbers = STATE_NUMBERS[jnp.dtype(self.dtype)]
        return min(64, max(gpu.MIN_TILE, numbers // self.keys.size))

    @property
    def keys(self) -> gpu.Span:
        """All key channels."""
        return self.channels(0, gpu.tile_size(self.key), self.key)

    def channels(self, n: Any, width: int, size: int) -> gpu.Span:
        """The n-th tile of `width` out of `size` channels."""
        return gpu.span(n * width, width, size, size % width == 0)

    def values(self, n: Any, width: int) -> gpu.Span:
        """The n-th tile of the value channels."""
        return self.channels(n, width, self.value)

    def tokens(self, t: Any) -> gpu.Span:
        """The tokens of chunk t; in reverse chunk 0 begins with the last token."""
        span = gpu.reversed_span if self.reverse else gpu.span
        return span(t * self.chunk, self.chunk, self.length, self.length % self.chunk == 0)

    def padded(self, t: Any) -> gpu.Span:
        """The same tokens in an array of padded rows, which are in walking order."""
        return gpu.span(t * self.chunk, self.chunk, self.rows, True)

    @property
    def columns(self) -> gpu.Span:
        """The tokens of a chunk as the columns of its scores."""
        return gpu.span(0, self.chunk, self.chunk, True)

    def program(self) -> tuple[Any, Any, Any]:
        """Batch and head of a program of a grid (x, B H), and x."""
        x, batch_and_head = pl.program_id(0), pl.program_id(1)
        return batch_and_head // self.heads, batch_and_head % self.heads, x

    def segments(self, numbers: Any, b: Any, t: Any) -> Segments | None:
        """The segments of chunk t; numbers: a ref to those of all tokens [B, T], or None."""
        start = t * self.chunk
        return load_segments(numbers, b, start, self.chunk, self.length, self.reverse)

    def part_chunks(self, part: Any, parts: int) -> tuple[Any, Any]:
        """The first chunk of a part of time, and the first after it."""
        first = part * pl.cdiv(self.chunks, parts)
        return first, jnp.minimum(first + pl.cdiv(self.chunks, parts), self.chunks)

    def tokens_shape(self, x: jax.Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """The shape of an output like x [B, T, ..]."""
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)

    def rows_shape(self, channels: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """The shape of an output [B, H, G C, channels]."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.rows, channels), dtype)

    def chunks_shape(self, *sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """The shape of an output [B, H, G, *sizes]."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, *sizes), dtype)


class ChunkInputs(NamedTuple):
    """q, k and their decays as arrays, or as refs inside a kernel.

    Without a decay for each channel: q, k [B, T, HK, K]; log None, [H] or [B, T, H]; numbers None
    or [B, T], those of segments; scores and total None.

    With one, as `channel_scores` computes them: q (scale prefix . q), k (suffix . k)
    [B, H, G C, K]; scores P [B, H, G C, C]; total [B, H, G, K]; log and numbers None."""

    q: Any
    k: Any
    log: Any = None
    numbers: Any = None
    scores: Any = None
    total: Any = None


@dataclass(frozen=True)
class Chunk:
    """Chunk t of batch b and head h, inside a kernel."""

    sizes: Sizes
    refs: ChunkInputs
    matmul: gpu.Matmul
    b: Any
    h: Any
    t: Any

    def queries(self, channels: gpu.Span) -> jax.Array:
        """[C, K]."""
        return self._keys(self.refs.q, channels)

    def keys(self, channels: gpu.Span) -> jax.Array:
        """[C, K]."""
        return self._keys(self.refs.k, channels)

    def _keys(self, ref: Any, channels: gpu.Span) -> jax.Array:
        if self.refs.scores is not None:
            return gpu.load(ref, self.b, self.h, self.sizes.padded(self.t), channels)
        tokens, group = self.sizes.tokens(self.t), self.sizes.heads // ref.shape[2]
        return gpu.load(ref, self.b, tokens, self.h // group, channels)

    def values(self, ref: Any, channels: gpu.Span) -> jax.Array:
        """[C, V] of v or do [B, T, H, V]."""
        return gpu.load(ref, self.b, self.sizes.tokens(self.t), self.h, channels)

    def padded(self, ref: Any, columns: gpu.Span) -> jax.Array:
        """[C, columns] of an array [B, H, G C, ..] that another kernel wrote."""
        return gpu.load(ref, self.b, self.h, self.sizes.padded(self.t), columns)

    def boundary(self, ref: Any, keys: gpu.Span, values: gpu.Span) -> jax.Array:
        """[K, V] of states at the boundaries of chunks [B, H, G, K, V]."""
        return gpu.load(ref, self.b, self.h, self.t, keys, values)

    def log(self) -> jax.Array | None:
        """[C] float32, zero for tokens past the end; None: no decay."""
        ref, sizes = self.refs.log, self.sizes
        if ref is None:
            return None
        if len(ref.shape) == 3:
            log = gpu.load(ref, self.b, sizes.tokens(self.t), self.h)
            return log.astype(jnp.float32)
        token = self.t * sizes.chunk + lax.iota(jnp.int32, sizes.chunk)
        log = gpu.load(ref, self.h).astype(jnp.float32)
        return jnp.where(token < sizes.length, log, 0.0)

    def decay(self) -> TokenDecay:
        """The products of the chunk's decays; of ones where `channel_scores` has applied them."""
        sizes = self.sizes
        segments = sizes.segments(self.refs.numbers, self.b, self.t)
        return token_decay(self.log(), segments, self.matmul, sizes.chunk)

    def times_total(self, decay: TokenDecay, state: jax.Array, keys: gpu.Span) -> jax.Array:
        """total S, of a state [K, V] at the chunk's start."""
        if self.refs.total is None:
            return decay.times_total(state)
        total = gpu.load(self.refs.total, self.b, self.h, self.t, keys)  # [K]
        return state * total[:, None]


def key_gradient_dtypes(q: jax.Array, k: jax.Array, sizes: Sizes) -> tuple[Any, Any]:
    """The dtypes in which kernels write dq and dk of each value head: float32 where those of
    several heads are added up afterwards."""
    alone = q.shape[2] == sizes.heads
    return tuple(x.dtype if alone else jnp.dtype(jnp.float32) for x in (q, k))  # pyright: ignore
