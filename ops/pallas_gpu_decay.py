"""Products of decays over the intervals of a chunk, inside GPU kernels.

As in `ops/chunking.py` a chunk needs, of the decays a_t of its tokens,

    W_ij = a_{j+1} .. a_i  (i >= j)     prefix_i = a_0 .. a_i     suffix_j = a_{j+1} .. a_{C-1}     total = a_0 .. a_{C-1}

and takes them from sums of logs, all of one sign: nothing is subtracted, so nothing cancels, and no exponent is
positive. Sums are matmuls with zeros and ones. Where a segment starts, products are set to zero by comparing segment
numbers, not by a log.

One decay for all channels (constant or per token): W is a matrix, made from L_ij = sum_t [t <= i] [t > j] log a_t.

One per channel: W_ijc has a third axis. A block of 2b tokens splits in the middle: with i in its second half and j in
its first, W_ij = (a_middle .. a_i) (a_{j+1} .. a_{middle-1}). With X the queries times the first factor in second
halves and the keys times the second factor in first halves, X X^T holds the scores of all those pairs; one matmul for
each b = 1, 2, 4 .. C/2 covers all i > j. Backward, with M the gradient of the scores of these pairs and of their mirror
images, dX = M X, and the gradient of the logs is the adjoint of their sums applied to X dX.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import pallas_gpu as gpu

CHANNELS = 64  # channels of a tile where each has its own decay


def segment_numbers(segment_ids: jax.Array | None) -> jax.Array | None:
    """[B, T] int32, counted up where the id changes; None for one segment."""
    if segment_ids is None:
        return None
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, 1, dtype=jnp.int32), ((0, 0), (1, 0)))


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


def load_segments(
    ref: Any, batch: Any, start: Any, chunk: int, length: int
) -> Segments | None:
    """Of the chunk that begins at token `start`; places past the end count to the last token's segment."""
    if ref is None:
        return None
    rows = jnp.minimum(start + lax.iota(jnp.int32, chunk), length - 1)
    before, last = jnp.maximum(start - 1, 0), jnp.minimum(start + chunk, length) - 1
    every = gpu.Span(rows, None)
    return Segments(
        gpu.load(ref, batch, every),
        gpu.load(ref, batch, before),
        gpu.load(ref, batch, last),
    )


# --- One decay for all channels ---------------------------------------------------------------------------------------


class TokenDecay(NamedTuple):
    """Products of one chunk: W [C, C], zero above the diagonal; prefix and suffix [C]; total, a scalar. None: ones."""

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
        jnp.where(segments.passes, 1.0 if total is None else total, 0.0),
    )


def token_log_gradient(
    of_weights: jax.Array,
    of_prefix: jax.Array,
    of_suffix: jax.Array,
    of_total: jax.Array,
    matmul: gpu.Matmul,
) -> jax.Array:
    """[C], the gradient of the logs; arguments: factor times cotangent of the products, [C, C], [C], [C] and []."""
    chunk = of_prefix.shape[0]
    row, column = gpu.indices(chunk, chunk)
    from_t_on = matmul.sums(row <= column, of_weights)  # [t, j]: sum over i >= t
    inside = jnp.where(row > column, from_t_on, 0.0).sum(1)
    later = jnp.where(row >= column, of_prefix[:, None], 0.0).sum(0)
    earlier = jnp.where(row > column, of_suffix[None, :], 0.0).sum(1)
    return inside + later + earlier + of_total


# --- One decay per channel --------------------------------------------------------------------------------------------


def _levels(chunk: int) -> list[int]:
    return [1 << n for n in range(chunk.bit_length() - 1)]


def _level(b: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """second [C, 1]: rows in second halves; which [C, C]: the tokens whose logs a row sums; pairs [C, C], both ways."""
    row, column = gpu.indices(chunk, chunk)
    second = (row & b) != 0
    after = jnp.where(second, column <= row, column > row)
    differ = row ^ column
    halves = (gpu.indices(chunk, 1)[0] & b) != 0
    return halves, after & (differ < b), (differ >= b) & (differ < 2 * b)


class ChannelDecay(NamedTuple):
    """What `channel_scores` computes, for the G chunks of [B, H, T padded to G C].

    scores [B, H, GC, C]: of a row with the tokens of its chunk, times `scale`; q_start [B, H, GC, K]: scale q prefix;
    k_end [B, H, GC, K]: k suffix; total [B, H, G, K], float32.
    """

    scores: jax.Array
    q_start: jax.Array
    k_end: jax.Array
    total: jax.Array


def channel_scores(
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array,
    numbers: jax.Array | None,
    scale: float,
    chunk: int,
    dtype: Any,
) -> ChannelDecay:
    """q, k [B, T, HK, K], decay_log [B, T, H, K], numbers [B, T]; results but `total` in `dtype`."""
    batch, length, heads, key = decay_log.shape
    chunks = pl.cdiv(length, chunk)
    rows = chunks * chunk
    like = jax.ShapeDtypeStruct

    def kernel(q, k, log, numbers, scores, q_start, k_end, total, *, compiled):
        matmul = gpu.Matmul(dtype, compiled)
        t, at = pl.program_id(0), pl.program_id(1)
        b, h = at // heads, at % heads
        hk = h // (heads // q.shape[2])
        segments = load_segments(numbers, b, t * chunk, chunk, length)
        tokens = gpu.span(t * chunk, chunk, length, length % chunk == 0)
        row, column = gpu.indices(chunk, chunk)

        def channels(n: Any, sums: jax.Array) -> jax.Array:
            width = min(CHANNELS, gpu.tile_size(key))
            cs = gpu.span(n * width, width, key, key % width == 0)
            q_, k_ = (
                gpu.load(x, b, tokens, hk, cs).astype(jnp.float32) for x in (q, k)
            )
            log_ = gpu.load(log, b, tokens, h, cs).astype(jnp.float32)
            for level in _levels(chunk):
                second, which, pairs = _level(level, chunk)
                x = jnp.where(second, q_, k_) * jnp.exp(matmul.sums(which, log_))
                sums += jnp.where(pairs & (row > column), matmul.nt(x, x), 0.0)
            sums += jnp.where(row == column, (q_ * k_).sum(1)[:, None], 0.0)
            read = scale * q_ * jnp.exp(matmul.sums(row >= column, log_))
            write = k_ * jnp.exp(matmul.sums(row < column, log_))
            whole = jnp.exp(log_.sum(0))
            if segments is not None:
                read = jnp.where(segments.reads[:, None], read, 0.0)
                write = jnp.where(segments.writes[:, None], write, 0.0)
                whole = jnp.where(segments.passes, whole, 0.0)
            every = gpu.span(t * chunk, chunk, rows, True)
            gpu.store(q_start, read, b, h, every, cs)
            gpu.store(k_end, write, b, h, every, cs)
            gpu.store(total, whole, b, h, t, cs)
            return sums

        tiles = pl.cdiv(key, CHANNELS)
        sums = lax.fori_loop(0, tiles, channels, jnp.zeros((chunk, chunk), jnp.float32))
        if segments is not None:
            sums = jnp.where(segments.same, sums, 0.0)
        every = gpu.span(t * chunk, chunk, rows, True)
        gpu.store(scores, scale * sums, b, h, every, gpu.span(0, chunk, chunk, True))

    return ChannelDecay(
        *gpu.call(
            "decay_scores",
            kernel,
            (chunks, batch * heads),
            (q, k, decay_log, numbers),
            (
                like((batch, heads, rows, chunk), dtype),
                like((batch, heads, rows, key), dtype),
                like((batch, heads, rows, key), dtype),
                like((batch, heads, chunks, key), jnp.float32),
            ),
            warps=4,
        )
    )


def channel_scores_adjoint(
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array,
    numbers: jax.Array | None,
    dscores: jax.Array,
    dq_start: jax.Array,
    dk_end: jax.Array,
    dtotal: jax.Array,
    scale: float,
    chunk: int,
    dtype: Any,
    dtypes: Sequence[Any],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and decay_log, all [B, T, H, K] in `dtypes`, from those of the results of `channel_scores`."""
    batch, length, heads, key = decay_log.shape
    chunks = pl.cdiv(length, chunk)
    rows = chunks * chunk

    def kernel(
        q, k, log, numbers, dscores, dq_start, dk_end, dtotal, dq, dk, dlog, *, compiled
    ):
        matmul = gpu.Matmul(dtype, compiled)
        t, at = pl.program_id(0), pl.program_id(1)
        n, at = at % tiles, at // tiles
        b, h = at // heads, at % heads
        hk = h // (heads // q.shape[2])
        segments = load_segments(numbers, b, t * chunk, chunk, length)
        tokens = gpu.span(t * chunk, chunk, length, length % chunk == 0)
        every = gpu.span(t * chunk, chunk, rows, True)
        cs = gpu.span(n * width, width, key, key % width == 0)
        row, column = gpu.indices(chunk, chunk)

        q_, k_ = (gpu.load(x, b, tokens, hk, cs).astype(jnp.float32) for x in (q, k))
        log_ = gpu.load(log, b, tokens, h, cs).astype(jnp.float32)
        square = gpu.span(0, chunk, chunk, True)
        of_scores = scale * gpu.load(dscores, b, h, every, square).astype(jnp.float32)
        of_scores = jnp.where(row >= column, of_scores, 0.0)
        if segments is not None:
            of_scores = jnp.where(segments.same, of_scores, 0.0)
        diagonal = jnp.where(row == column, of_scores, 0.0).sum(1)[:, None]
        both = of_scores + of_scores.T  # the diagonal, twice, is in no level

        prefix = jnp.exp(matmul.sums(row >= column, log_))
        suffix = jnp.exp(matmul.sums(row < column, log_))
        whole = jnp.exp(log_.sum(0))
        dread = scale * gpu.load(dq_start, b, h, every, cs).astype(jnp.float32)
        dwrite = gpu.load(dk_end, b, h, every, cs).astype(jnp.float32)
        dwhole = gpu.load(dtotal, b, h, t, cs)
        if segments is not None:
            dread = jnp.where(segments.reads[:, None], dread, 0.0)
            dwrite = jnp.where(segments.writes[:, None], dwrite, 0.0)
            dwhole = jnp.where(segments.passes, dwhole, 0.0)
        dread, dwrite = dread * prefix, dwrite * suffix
        dq_, dk_ = dread + diagonal * k_, dwrite + diagonal * q_
        dlog_ = (dwhole * whole)[None, :] + matmul.sums(row <= column, dread * q_)
        dlog_ += matmul.sums(row > column, dwrite * k_)
        for level in _levels(chunk):
            second, which, pairs = _level(level, chunk)
            factor = jnp.exp(matmul.sums(which, log_))
            x = jnp.where(second, q_, k_) * factor
            dx = matmul.nn(jnp.where(pairs, both, 0.0), x)
            dlog_ += matmul.sums(_transposed(level, chunk), x * dx)
            dx *= factor
            dq_ += jnp.where(second, dx, 0.0)
            dk_ += jnp.where(second, 0.0, dx)
        for ref, x in ((dq, dq_), (dk, dk_), (dlog, dlog_)):
            gpu.store(ref, x, b, tokens, h, cs)

    width = min(CHANNELS, gpu.tile_size(key))
    tiles = pl.cdiv(key, width)
    return gpu.call(
        "decay_scores_adjoint",
        kernel,
        (chunks, batch * heads * tiles),
        (q, k, decay_log, numbers, dscores, dq_start, dk_end, dtotal),
        [jax.ShapeDtypeStruct(decay_log.shape, dtype) for dtype in dtypes],
        warps=4,
    )


def _transposed(b: int, chunk: int) -> jax.Array:
    """`which` of `_level`, rows and columns exchanged."""
    row, column = gpu.indices(chunk, chunk)
    second = (column & b) != 0
    after = jnp.where(second, row <= column, row > column)
    return after & ((row ^ column) < b)
