"""Products of decays over the intervals of a chunk, inside GPU kernels.

As in `ops/chunks/chunking.py` a chunk needs, of the decays a_t of its tokens,

    W_ij = a_{j+1} .. a_i  (i >= j)    prefix_i = a_0 .. a_i    suffix_j = a_{j+1} .. a_{C-1}
    total = a_0 .. a_{C-1}

and takes them from sums of logs, all of one sign: nothing is subtracted, so nothing cancels, and no
exponent is positive. Sums are matmuls with zeros and ones. Where a segment starts, products are set
to zero by comparing segment numbers, not by a log.

One decay for all channels (constant or per token): W is a matrix, made from L_ij = sum_t [t <= i]
[t > j] log a_t.

One per channel: W_ijc has a third axis. A block of 2b tokens splits in the middle: with i in its
second half and j in its first, W_ij = (a_middle .. a_i) (a_{j+1} .. a_{middle-1}). With X the
queries times the first factor in second halves and the keys times the second factor in first
halves, X X^T holds the scores of all those pairs; one matmul for each b = 1, 2, 4 .. C/2 covers all
i > j. Backward, with M the gradient of the scores of these pairs and of their mirror images, dX = M
X, and the gradient of the logs is the adjoint of their sums applied to X dX."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import tiles as gpu

CHANNELS = 32  # channels of a tile where each has its own decay


class Segments(NamedTuple):
    """Numbers of a chunk's tokens [C], of the token before the chunk and of its last token."""

    rows: jax.Array
    before: jax.Array
    last: jax.Array

    @property
    def same(self) -> jax.Array:
        """[C, C], whether two tokens are in one segment."""
        return self.rows[:, None] == self.rows[None, :]

    @property
    def reads(self) -> jax.Array:
        """[C], whether the chunk's first state reaches a token."""
        return self.rows == self.before

    @property
    def writes(self) -> jax.Array:
        """[C], whether a token reaches the chunk's last state."""
        return self.rows == self.last

    @property
    def passes(self) -> jax.Array:
        return self.before == self.last


def load_segments(ref: Any, batch: Any, start: Any, chunk: int, length: int) -> Segments | None:
    """Of the chunk that begins at token `start`; places past the end count to the last token's
    segment."""
    if ref is None:
        return None
    rows = jnp.minimum(start + lax.iota(jnp.int32, chunk), length - 1)
    before, last = jnp.maximum(start - 1, 0), jnp.minimum(start + chunk, length) - 1
    every = gpu.Span(rows, None)
    return Segments(
        gpu.load(ref, batch, every), gpu.load(ref, batch, before), gpu.load(ref, batch, last)
    )


# --- One decay for all channels
# ---------------------------------------------------------------------------------------


class TokenDecay(NamedTuple):
    """Products of one chunk: W [C, C], zero above the diagonal; prefix and suffix [C]; total, a
    scalar. None: ones."""

    weights: jax.Array
    prefix: jax.Array | None
    suffix: jax.Array | None
    total: jax.Array | None

    def read(self, x: jax.Array) -> jax.Array:
        return x if self.prefix is None else x * self.prefix[:, None]

    def write(self, x: jax.Array) -> jax.Array:
        return x if self.suffix is None else x * self.suffix[:, None]

    def keep(self, state: jax.Array) -> jax.Array:
        return state if self.total is None else state * self.total


def token_decay(
    log: jax.Array | None, segments: Segments | None, matmul: gpu.Matmul, chunk: int
) -> TokenDecay:
    """log: [C] or None; zero where no token is."""
    row, column = gpu.indices(chunk, chunk)
    lower = row >= column
    if log is None:
        weights = jnp.where(lower, 1.0, 0.0)
        prefix = suffix = total = None
    else:
        after = jnp.where(row > column, log[:, None], 0.0)
        weights = jnp.exp(matmul.sums(lower, after))
        prefix = jnp.exp(jnp.where(lower, log[None, :], 0.0).sum(1))
        suffix = jnp.exp(after.sum(0))
        total = jnp.exp(log.sum(0))
    if segments is None:
        return TokenDecay(jnp.where(lower, weights, 0.0), prefix, suffix, total)
    ones = jnp.ones((chunk,), jnp.float32)
    return TokenDecay(
        jnp.where(lower & segments.same, weights, 0.0),
        jnp.where(segments.reads, ones if prefix is None else prefix, 0.0),
        jnp.where(segments.writes, ones if suffix is None else suffix, 0.0),
        # Of two Python numbers the lowering would make a bool.
        jnp.where(segments.passes, jnp.float32(1) if total is None else total, 0.0),
    )


def token_log_gradient(
    of_weights: jax.Array,
    of_prefix: jax.Array,
    of_suffix: jax.Array,
    of_total: jax.Array,
    matmul: gpu.Matmul,
) -> jax.Array:
    """[C], the gradient of the logs; arguments: factor times cotangent of the products, [C, C],
    [C], [C] and []."""
    chunk = of_prefix.shape[0]
    row, column = gpu.indices(chunk, chunk)
    from_t_on = matmul.sums(row <= column, of_weights)  # [t, j]: sum over i >= t
    inside = jnp.where(row > column, from_t_on, 0.0).sum(1)
    later = jnp.where(row >= column, of_prefix[:, None], 0.0).sum(0)
    earlier = jnp.where(row > column, of_suffix[None, :], 0.0).sum(1)
    return inside + later + earlier + of_total


# --- One decay per channel
# --------------------------------------------------------------------------------------------


def _levels(chunk: int) -> int:
    return chunk.bit_length() - 1


def _level(b: Any, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """second [C, 1]: rows in second halves; which [C, C]: the tokens whose logs a row sums; pairs
    [C, C], both ways."""
    row, column = gpu.indices(chunk, chunk)
    second = (row & b) != 0
    after = jnp.where(second, column <= row, column > row)
    differ = row ^ column
    halves = (gpu.indices(chunk, 1)[0] & b) != 0
    return halves, after & (differ < b), (differ >= b) & (differ < 2 * b)


class ChannelDecay(NamedTuple):
    """What `channel_scores` computes, for the G chunks of [B, H, T padded to G C]; or the
    cotangents of that.

    scores [B, H, GC, C]: of a row with the tokens of its chunk, times `scale`; q_start [B, H, GC,
    K]: scale q prefix; k_end [B, H, GC, K]: k suffix; total [B, H, G, K], float32. Where asked for,
    of keys with keys: key_scores [B, H, GC, C], those of earlier tokens only, float32; key_start
    [B, H, GC, K]: k prefix."""

    scores: Any
    q_start: Any
    k_end: Any
    total: Any
    key_scores: Any = None
    key_start: Any = None


def channel_scores(
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array,
    numbers: jax.Array | None,
    scale: float,
    chunk: int,
    dtype: Any,
    keys: bool = False,
    *,
    interpret: bool,
) -> ChannelDecay:
    """q, k [B, T, HK, K], decay_log [B, T, H, K], numbers [B, T]; results in `dtype` where not said
    otherwise.

    keys: also the scores of keys with keys.
    """
    batch, length, heads, key = decay_log.shape
    tile = _Tiles(length, heads, q.shape[2], key, chunk)
    chunks, rows = tile.chunks, tile.chunks * chunk

    def kernel(q, k, log, numbers, out):
        matmul = gpu.Matmul(dtype)
        t, at = pl.program_id(0), pl.program_id(1)
        b, h = at // heads, at % heads
        segments = load_segments(numbers, b, t * chunk, chunk, length)
        row, column = gpu.indices(chunk, chunk)
        padded, square = tile.padded(t), gpu.span(0, chunk, chunk, True)

        def channels(n: Any, sums: Any) -> Any:
            cs = tile.channels(n)
            q_, k_, log_ = tile.load(b, h, t, cs, q, k, log)

            def level(n: Any, sums: Any) -> Any:
                second, which, pairs = _level(jnp.left_shift(1, n), chunk)
                earlier = pairs & (row > column)
                factor = jnp.exp(matmul.sums(which, log_))
                x = jnp.where(second, q_, k_) * factor
                products = [matmul.nt(x, x)]
                if keys:
                    y = k_ * factor
                    products.append(matmul.nt(y, y))
                return [
                    total + jnp.where(earlier, x, 0.0)
                    for total, x in zip(sums, products, strict=True)
                ]

            sums = lax.fori_loop(0, _levels(chunk), level, list(sums))
            sums[0] += jnp.where(row == column, (q_ * k_).sum(1)[:, None], 0.0)
            prefix = jnp.exp(matmul.sums(row >= column, log_))
            suffix = jnp.exp(matmul.sums(row < column, log_))
            total = jnp.exp(log_.sum(0))
            if segments is not None:
                prefix = jnp.where(segments.reads[:, None], prefix, 0.0)
                suffix = jnp.where(segments.writes[:, None], suffix, 0.0)
                total = jnp.where(segments.passes, total, 0.0)
            gpu.store(out.q_start, scale * q_ * prefix, b, h, padded, cs)
            gpu.store(out.k_end, k_ * suffix, b, h, padded, cs)
            gpu.store(out.total, total, b, h, t, cs)
            if keys:
                gpu.store(out.key_start, k_ * prefix, b, h, padded, cs)
            return sums

        zeros = [jnp.zeros((chunk, chunk), jnp.float32)] * (2 if keys else 1)
        sums = lax.fori_loop(0, tile.count, channels, zeros)
        if segments is not None:
            sums = [jnp.where(segments.same, x, 0.0) for x in sums]
        gpu.store(out.scores, scale * sums[0], b, h, padded, square)
        if keys:
            gpu.store(out.key_scores, sums[1], b, h, padded, square)

    like = functools.partial(_of_heads, batch, heads)
    (result,) = gpu.call(
        "decay_scores",
        kernel,
        (chunks, batch * heads),
        (q, k, decay_log, numbers),
        [
            ChannelDecay(
                like(rows, chunk, dtype),
                like(rows, key, dtype),
                like(rows, key, dtype),
                like(chunks, key, jnp.float32),
                like(rows, chunk, jnp.float32) if keys else None,
                like(rows, key, dtype) if keys else None,
            )
        ],
        warps=4,
        interpret=interpret,
    )
    return result


def channel_scores_adjoint(
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array,
    numbers: jax.Array | None,
    cotangents: ChannelDecay,
    scale: float,
    chunk: int,
    dtype: Any,
    dtypes: Sequence[Any],
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and decay_log, all [B, T, H, K] in `dtypes`, from those of the results of
    `channel_scores`."""
    batch, length, heads, key = decay_log.shape
    tile = _Tiles(length, heads, q.shape[2], key, chunk)

    def kernel(q, k, log, numbers, cotangents, dq, dk, dlog):
        matmul = gpu.Matmul(dtype)
        at, head = pl.program_id(0), pl.program_id(1)
        n, t = at % tile.count, at // tile.count
        b, h = head // heads, head % heads
        segments = load_segments(numbers, b, t * chunk, chunk, length)
        row, column = gpu.indices(chunk, chunk)
        padded, square = tile.padded(t), gpu.span(0, chunk, chunk, True)
        cs = tile.channels(n)
        q_, k_, log_ = tile.load(b, h, t, cs, q, k, log)

        def of_scores(ref: Any, which: jax.Array) -> jax.Array:
            x = gpu.load(ref, b, h, padded, square).astype(jnp.float32)
            return jnp.where(which if segments is None else which & segments.same, x, 0.0)

        def of_rows(ref: Any, which: Any) -> jax.Array:
            x = gpu.load(ref, b, h, padded, cs).astype(jnp.float32)
            return x if segments is None else jnp.where(which[:, None], x, 0.0)

        dscores = scale * of_scores(cotangents.scores, row >= column)
        diagonal = jnp.where(row == column, dscores, 0.0).sum(1)[:, None]
        both = [dscores + dscores.T]  # the diagonal, twice, is in no level
        if cotangents.key_scores is not None:
            of_keys = of_scores(cotangents.key_scores, row > column)
            both.append(of_keys + of_keys.T)

        reads = None if segments is None else segments.reads
        prefix = jnp.exp(matmul.sums(row >= column, log_))
        dq_ = scale * of_rows(cotangents.q_start, reads) * prefix
        of_prefix = dq_ * q_
        dk_ = jnp.zeros_like(dq_)
        if cotangents.key_start is not None:
            dk_ = of_rows(cotangents.key_start, reads) * prefix
            of_prefix += dk_ * k_
        writes = None if segments is None else segments.writes
        suffix = jnp.exp(matmul.sums(row < column, log_))
        dk_end = of_rows(cotangents.k_end, writes) * suffix
        dtotal = gpu.load(cotangents.total, b, h, t, cs) * jnp.exp(log_.sum(0))
        if segments is not None:
            dtotal = jnp.where(segments.passes, dtotal, 0.0)
        dlog_ = dtotal[None, :] + matmul.sums(row <= column, of_prefix)
        dlog_ += matmul.sums(row > column, dk_end * k_)
        dq_, dk_ = dq_ + diagonal * k_, dk_ + dk_end + diagonal * q_

        def level(n: Any, sums: Any) -> Any:
            dq_, dk_, dlog_ = sums
            second, which, pairs = _level(jnp.left_shift(1, n), chunk)
            factor = jnp.exp(matmul.sums(which, log_))
            x = jnp.where(second, q_, k_) * factor
            dx = matmul.nn(jnp.where(pairs, both[0], 0.0), x)
            of_factor, dx = x * dx, dx * factor
            dq_, dk_ = (dq_ + jnp.where(second, dx, 0.0), dk_ + jnp.where(second, 0.0, dx))
            for of_keys in both[1:]:
                y = k_ * factor
                dy = matmul.nn(jnp.where(pairs, of_keys, 0.0), y)
                of_factor += y * dy
                dk_ += dy * factor
            mirrored = _mirrored_sums(jnp.left_shift(1, n), chunk)
            return dq_, dk_, dlog_ + matmul.sums(mirrored, of_factor)

        sums = lax.fori_loop(0, _levels(chunk), level, (dq_, dk_, dlog_))
        for ref, x in zip((dq, dk, dlog), sums, strict=True):
            gpu.store(ref, x, b, tile.tokens(t), h, cs)

    return gpu.call(
        "decay_scores_adjoint",
        kernel,
        (tile.chunks * tile.count, batch * heads),
        (q, k, decay_log, numbers, cotangents),
        [jax.ShapeDtypeStruct(decay_log.shape, dtype) for dtype in dtypes],
        warps=4,
        interpret=interpret,
    )


def _mirrored_sums(b: Any, chunk: int) -> jax.Array:
    """`which` of `_level`, rows and columns exchanged."""
    row, column = gpu.indices(chunk, chunk)
    after = jnp.where((column & b) != 0, row <= column, row > column)
    return after & ((row ^ column) < b)


def _of_heads(batch: int, heads: int, *shape: Any) -> jax.ShapeDtypeStruct:
    *sizes, dtype = shape
    return jax.ShapeDtypeStruct((batch, heads, *sizes), dtype)


@dataclass(frozen=True)
class _Tiles:
    """How chunks and channels of q, k [B, T, HK, K] and decays [B, T, H, K] are read."""

    length: int
    heads: int
    key_heads: int
    key: int
    chunk: int

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def width(self) -> int:
        return min(CHANNELS, gpu.tile_size(self.key))

    @property
    def count(self) -> int:
        """Tiles of channels."""
        return pl.cdiv(self.key, self.width)

    def channels(self, n: Any) -> gpu.Span:
        whole = self.key % self.width == 0
        return gpu.span(n * self.width, self.width, self.key, whole)

    def tokens(self, t: Any) -> gpu.Span:
        whole = self.length % self.chunk == 0
        return gpu.span(t * self.chunk, self.chunk, self.length, whole)

    def padded(self, t: Any) -> gpu.Span:
        """The same rows of an array that is padded to whole chunks."""
        return gpu.span(t * self.chunk, self.chunk, self.chunks * self.chunk, True)

    def load(
        self, b: Any, h: Any, t: Any, channels: gpu.Span, q: Any, k: Any, log: Any
    ) -> list[jax.Array]:
        """q, k and log [C, channels], float32."""
        key_head = h // (self.heads // self.key_heads)
        return [
            gpu.load(ref, b, self.tokens(t), head, channels).astype(jnp.float32)
            for ref, head in ((q, key_head), (k, key_head), (log, h))
        ]
