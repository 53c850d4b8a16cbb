"""How the GPU kernels of matrix-state recurrences see a sequence: chunk by chunk, and what they
read of each."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import tiles as gpu
from .decay import TokenDecay, load_segments, token_decay


def chunk_length(length: int) -> int:
    """C: 64, the rows of Hopper's matmuls, or fewer where there are not as many tokens."""
    return min(64, gpu.tile_size(length))


@dataclass(frozen=True)
class Sizes:
    """What is static in a call; chunk: C; dtype: of matmuls; scale: what scores and reads still
    lack."""

    batch: int
    length: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: Any
    scale: float
    interpret: bool

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def rows(self) -> int:
        """T padded to whole chunks."""
        return self.chunks * self.chunk

    @property
    def warps(self) -> int:
        """Of a program with tiles of 64 x 64; three products for one take twice the registers."""
        return 4 if self.dtype == jnp.bfloat16 else 8

    @property
    def keys(self) -> gpu.Span:
        """All key channels."""
        return self.channels(0, gpu.tile_size(self.key), self.key)

    def channels(self, n: Any, width: int, size: int) -> gpu.Span:
        """The n-th tile of `size` channels."""
        return gpu.span(n * width, width, size, size % width == 0)

    def values(self, n: Any, width: int) -> gpu.Span:
        return self.channels(n, width, self.value)

    def tokens(self, t: Any) -> gpu.Span:
        whole = self.length % self.chunk == 0
        return gpu.span(t * self.chunk, self.chunk, self.length, whole)

    def padded(self, t: Any) -> gpu.Span:
        """The same rows of an array that is padded to whole chunks."""
        return gpu.span(t * self.chunk, self.chunk, self.rows, True)

    @property
    def square(self) -> gpu.Span:
        """The tokens of a chunk, as columns of scores."""
        return gpu.span(0, self.chunk, self.chunk, True)

    def place(self) -> tuple[Any, Any, Any]:
        """Batch and head of a program of a grid (anything, B H), and its first coordinate."""
        x, at = pl.program_id(0), pl.program_id(1)
        return at // self.heads, at % self.heads, x


class Inputs(NamedTuple):
    """What the kernels read besides values: arrays, or refs inside.

    With a decay per channel q, k, scores and total are those of `channel_scores`, log and numbers
    None. Otherwise scores and total are None: q, k [B, T, HK, K], log None, [H] or [B, T, H],
    numbers None or [B, T]."""

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
    inputs: Inputs
    matmul: gpu.Matmul
    b: Any
    h: Any
    t: Any

    def keys(self, ref: Any, columns: gpu.Span) -> jax.Array:
        """[C, columns] of `inputs.q` or `inputs.k`."""
        if self.inputs.scores is not None:
            return gpu.load(ref, self.b, self.h, self.sizes.padded(self.t), columns)
        group = self.sizes.heads // ref.shape[2]
        rows = self.sizes.tokens(self.t)
        return gpu.load(ref, self.b, rows, self.h // group, columns)

    def values(self, ref: Any, columns: gpu.Span) -> jax.Array:
        """[C, columns] of v or do."""
        return gpu.load(ref, self.b, self.sizes.tokens(self.t), self.h, columns)

    def log(self) -> jax.Array | None:
        """[C] float32, zero where no token is; None: no decay."""
        ref, sizes = self.inputs.log, self.sizes
        if ref is None:
            return None
        if len(ref.shape) == 3:
            log = gpu.load(ref, self.b, sizes.tokens(self.t), self.h)
            return log.astype(jnp.float32)
        place = self.t * sizes.chunk + lax.iota(jnp.int32, sizes.chunk)
        log = gpu.load(ref, self.h).astype(jnp.float32)
        return jnp.where(place < sizes.length, log, 0.0)

    def decay(self) -> TokenDecay:
        """W, prefix, suffix and total; all ones where `channel_scores` has seen to the decays."""
        sizes = self.sizes
        segments = load_segments(
            self.inputs.numbers, self.b, self.t * sizes.chunk, sizes.chunk, sizes.length
        )
        return token_decay(self.log(), segments, self.matmul, sizes.chunk)

    def keep(self, decay: TokenDecay, state: jax.Array, keys: gpu.Span) -> jax.Array:
        """What is left of `state` [keys, values] after the chunk."""
        if self.inputs.total is None:
            return decay.keep(state)
        total = gpu.load(self.inputs.total, self.b, self.h, self.t, keys)
        return state * total[:, None]

    def scores(self) -> jax.Array:
        """P [C, C] as `channel_scores` left it."""
        rows = self.sizes.padded(self.t)
        return gpu.load(self.inputs.scores, self.b, self.h, rows, self.sizes.square)


def key_dtypes(q: jax.Array, k: jax.Array, sizes: Sizes) -> tuple[Any, Any]:
    """Of gradients per value head: float32 where several are still to be added up."""
    alone = q.shape[2] == sizes.heads
    return tuple(x.dtype if alone else jnp.dtype(jnp.float32) for x in (q, k))  # pyright: ignore
