"""Products of decays over intervals inside one chunk, and their adjoint, in what a TPU kernel can
do.

As in `chunking.py`, W_ij = a_{j+1} .. a_i (i >= j) is never a quotient, an exponent is never
positive, and no sum of logs is ever the difference of two others. Three kinds of decay, one
interface. `products` gives what the recurrence needs of a chunk,

    P_ij = sum_c q_ic k_jc W_ijc   q_start = q . (start..i)   k_end = k . (j+1..end)   total =
    (start..end),

and `adjoint` maps their cotangents to those of q, k and log a. Both are generators (see
`interleave`) that return their result.

**Decay per channel.** The pairs of a chunk are split by halving, b = 1, 2, 4, .. C/2: in a block of
2b tokens, a query of the second half meets the keys of the first with W = suffix_j * prefix_i,
split in the middle. Queries and keys of a level have different rows, so one array holds both,

    X = q . prefix in second halves, k . suffix in first halves,       P_level = X X^T where i, j
    are such a pair,

and the adjoint is one product too, dX = N X with N = dP + dP^T at those pairs. Up to b = 4 rows of
a block share a register, and the exponents come from one product of 0/1 matrices with log a: sums
over exactly the interval's tokens. From b = 8 on whole registers are multiplied by the product of
the neighbouring block, a row: prefix_2b = prefix_b or total_b prefix_b. The log-gradient of every
factor (factor times cotangent) flows back along the same sums and products.

**One decay per token.** log W = (log a where t <= i) (1 where t > j) is again a product with a 0/1
matrix."""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments
from .blocks import LOG_ZERO, Blocks, Matmul, chunk_rows, flat, indices, read, valid_rows

SUBLANES = 8  # rows of a float32 register
SMALL_LEVELS = (1, 2, 4)


class Products(NamedTuple):
    """scores P [C, C], zero above the diagonal; q_start, k_end [C, K]; total [1, K or 1], or None
    for no decay.

    saved: what the adjoint needs besides.
    """

    scores: jax.Array
    q_start: jax.Array
    k_end: jax.Array
    total: jax.Array | None
    saved: Any = None


class Cotangents(NamedTuple):
    """Of q, k [C, K] and of log a: [C, K], or [1, C] for one decay per token, or None."""

    q: jax.Array
    k: jax.Array
    log: jax.Array | None


def lower(size: int) -> jax.Array:
    """[C, C], one on and below the diagonal.

    A factor, not a `where`: selected zeros would be merged into the operand of a matmul, which
    libtpu's cycle analysis does not survive on v5e."""
    row, column = indices(size, size)
    return (row >= column).astype(jnp.float32)


def decay(
    matmul: Matmul,
    blocks: Blocks,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    reverse: bool,
):
    """The kind of decay, and its kernel inputs as pairs of array and block spec.

    A constant decay is one of tokens, the same for the whole batch; with segments, no decay becomes
    one of tokens too, because a token that starts a segment has a decay of zero."""
    if decay_log is not None and decay_log.ndim == 4:
        return VectorDecay.inputs(matmul, blocks, decay_log, segment_ids, reverse)
    if decay_log is None and segment_ids is None:
        return NoDecay(matmul, blocks), []
    if decay_log is None:
        # The same for all blocks of heads.
        log_BHT = jnp.zeros((blocks.batch, blocks.heads, blocks.length), jnp.float32)
    elif decay_log.ndim == 1:
        log_BHT = jnp.broadcast_to(
            decay_log.astype(jnp.float32)[None, :, None], (1, blocks.all_heads, blocks.length)
        )
    else:
        log_BHT = decay_log.astype(jnp.float32).swapaxes(1, 2)
    if segment_ids is not None:
        log_BHT = jnp.where(segments.starts(segment_ids)[:, None], LOG_ZERO, log_BHT)
    return ScalarDecay.inputs(matmul, blocks, chunk_rows(log_BHT, blocks), reverse)


@dataclass(frozen=True)
class NoDecay:
    matmul: Matmul
    blocks: Blocks

    def load(self, refs: Any, chunk_index: jax.Array) -> "NoDecay":
        return self

    def ends(self, head: int, k: jax.Array) -> Generator[None, None, tuple[jax.Array, Any]]:
        """k_end and total of `products`, without the rest."""
        yield
        return k, None

    def write(
        self, matmul: Matmul, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array
    ) -> jax.Array:
        """x^T k_end, for x [C, V]."""
        return matmul.tn(x, k_end)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Generator[None, None, Products]:
        scores = self.matmul.nt(q, k)
        yield
        return Products(scores * lower(self.blocks.chunk), q, k, None)

    def adjoint(
        self, head, products, q, k, dscores, dq_start, dk_end, dtotal
    ) -> Generator[None, None, Cotangents]:
        dscores = dscores * lower(self.blocks.chunk)
        dq, dk = self.matmul.nn(dscores, k), self.matmul.tn(dscores, q)
        yield
        return Cotangents(dq + dq_start, dk + dk_end, None)


@dataclass(frozen=True)
class ScalarDecay:
    """One decay per token and head; kernel input: log a, prefix and suffix of the step [heads, 3C].

    log, suffix_row: [heads, C]; prefix, suffix: columns [C, heads]; total: [heads, 1].
    """

    matmul: Matmul
    blocks: Blocks
    log: Any = None
    prefix: Any = None
    suffix: Any = None
    total: Any = None
    suffix_row: Any = None

    @staticmethod
    def inputs(matmul: Matmul, blocks: Blocks, log_rows: jax.Array, reverse: bool):
        """log_rows: [B or 1, n, G, heads, C], 0 where no token is."""
        chunk = blocks.chunk
        until = np.tri(chunk, dtype=np.float32)
        both = np.concatenate([until.T, until - np.eye(chunk, dtype=np.float32)], 1)
        # One plain matrix: XLA takes a product with leading axes for a convolution over them.
        sums = einsum("rt,ti->ri", log_rows.reshape(-1, chunk), both).reshape(
            *log_rows.shape[:-1], 2 * chunk
        )
        rows = jnp.concatenate([log_rows, jnp.exp(sums)], -1)
        return ScalarDecay(matmul, blocks), [(rows, blocks.rows(rows, reverse))]

    def load(self, refs: Any, chunk_index: jax.Array) -> "ScalarDecay":
        chunk = self.blocks.chunk
        log, prefix, suffix = (
            refs[0][0, 0, 0, :, at : at + chunk] for at in range(0, 3 * chunk, chunk)
        )
        return ScalarDecay(
            self.matmul, self.blocks, log, prefix.T, suffix.T, prefix[:, -1:], suffix
        )

    def ends(self, head: int, k: jax.Array) -> Generator[None, None, tuple[jax.Array, Any]]:
        yield
        return (
            k.astype(jnp.float32) * self.suffix[:, head : head + 1],
            self.total[head : head + 1],
        )

    def write(
        self, matmul: Matmul, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array
    ) -> jax.Array:
        """As (x^T . suffix) k: a row spreads over registers for less than a column, and x is
        transposed anyway."""
        rows = x.T.astype(jnp.float32) * self.suffix_row[head : head + 1]
        return matmul.nn(rows, k)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Generator[None, None, Products]:
        chunk = self.blocks.chunk
        until, logs = lower(chunk), self.matmul.terms(self.log[head : head + 1], 2)
        row, column = indices(chunk, chunk)
        after = jnp.concatenate([(row > column).astype(jnp.float32)] * len(logs), 0)
        masked = jnp.concatenate([until * log for log in logs], 1)
        weights_log = self.matmul.nn(masked, after)
        scores = self.matmul.nt(q, k)
        yield
        weights = jnp.exp(weights_log) * until
        q_start = q.astype(jnp.float32) * self.prefix[:, head : head + 1]
        k_end = k.astype(jnp.float32) * self.suffix[:, head : head + 1]
        yield
        return Products(scores * weights, q_start, k_end, self.total[head : head + 1], weights)

    def adjoint(
        self, head, products, q, k, dscores, dq_start, dk_end, dtotal
    ) -> Generator[None, None, Cotangents]:
        chunk = self.blocks.chunk
        row, column = indices(chunk, chunk)
        dweighted = dscores * products.saved
        dq, dk = self.matmul.nn(dweighted, k), self.matmul.tn(dweighted, q)
        # Token t is inside the interval of every pair j < t <= i, in the prefix of i >= t and in
        # the suffix of j < t.
        until = self.matmul.nn(dscores * products.scores, (row < column).astype(jnp.float32))
        yield
        of_prefix = jnp.sum(products.q_start * dq_start, 1, keepdims=True)
        of_suffix = jnp.sum(products.k_end * dk_end, 1, keepdims=True)
        dlog = jnp.sum(jnp.where(row >= column, until + of_prefix, of_suffix), 0, keepdims=True)
        dlog += jnp.sum(dtotal, 1, keepdims=True) * products.total
        dq += dq_start * self.prefix[:, head : head + 1]
        dk += dk_end * self.suffix[:, head : head + 1]
        return Cotangents(dq, dk, dlog)


class VectorSaved(NamedTuple):
    """xs: per level X [C, K]; factors: per small level its factor [n, 8, K]; prefix, suffix [n, 8,
    K] of blocks of 8; totals: per level b >= 8 the products [C/b, 1, K] of its blocks."""

    xs: list[jax.Array]
    factors: list[jax.Array]
    prefix: jax.Array
    suffix: jax.Array
    totals: list[jax.Array]


@functools.cache
def interval_sums(chunk: int) -> np.ndarray:
    """[4C, C], zeros and ones: which log a to sum for X at b = 2 and 4, and for prefix and suffix
    in blocks of 8."""
    row, token = np.arange(chunk)[:, None], np.arange(chunk)[None]

    def level(b: int) -> np.ndarray:
        middle = row // (2 * b) * 2 * b + b
        return np.where(
            row >= middle, (middle <= token) & (token <= row), (row < token) & (token < middle)
        )

    same = row // SUBLANES == token // SUBLANES
    sums = [level(2), level(4), same & (token <= row), same & (token > row)]
    return np.concatenate(sums).astype(np.float32)


@functools.cache
def level_pairs(chunk: int) -> np.ndarray:
    """[levels, C, C]: one where i and j are in different halves of the same block of 2b tokens, b =
    1, 2, 4, .. C/2."""
    distance = np.arange(chunk)[:, None] ^ np.arange(chunk)[None]
    return np.stack([distance >> level == 1 for level in range(chunk.bit_length() - 1)]).astype(
        np.float32
    )


@dataclass(frozen=True)
class VectorDecay:
    """One decay per token and channel; kernel inputs: log a, the 0/1 matrices of the exponents,
    starts of segments."""

    matmul: Matmul
    blocks: Blocks
    parts: int
    segments: bool
    refs: Any = None
    valid: jax.Array | None = None
    start: jax.Array | None = None

    @staticmethod
    def inputs(matmul, blocks, decay_log, segment_ids, reverse):
        parts = 1 if matmul.dtype == jnp.float32 or decay_log.dtype == jnp.bfloat16 else 2
        sums = interval_sums(blocks.chunk)
        ends = np.concatenate(
            [np.tri(blocks.chunk).T - np.eye(blocks.chunk), np.ones((SUBLANES, blocks.chunk))]
        )
        constants = [np.tile(sums, (1, parts)), np.tile(ends, (1, parts))]
        if reverse:
            constants = [constants[0], sums.T, level_pairs(blocks.chunk)]
        inputs = [(flat(decay_log), blocks.tokens(blocks.key, reverse=reverse))]
        inputs += [
            (x, blocks.whole(x))
            for x in (
                jnp.asarray(c, matmul.dtype if c.ndim == 2 else jnp.float32) for c in constants
            )
        ]
        if segment_ids is not None:
            rows = chunk_rows(segments.starts(segment_ids)[:, None], blocks)
            inputs.append((rows, blocks.rows(rows, reverse)))
        return VectorDecay(matmul, blocks, parts, segment_ids is not None), inputs

    def load(self, refs: Any, chunk_index: jax.Array) -> "VectorDecay":
        start = jnp.transpose(refs[-1][0, 0, 0]) if self.segments else None
        return VectorDecay(
            self.matmul,
            self.blocks,
            self.parts,
            self.segments,
            refs,
            valid_rows(self.blocks, chunk_index),
            start,
        )

    def _log(self, head: int) -> jax.Array:
        log = read(self.refs[0], head, self.blocks.key, self.valid).astype(jnp.float32)
        return log if self.start is None else jnp.where(self.start > 0, LOG_ZERO, log)

    def ends(self, head: int, k: jax.Array) -> Generator[None, None, tuple[jax.Array, Any]]:
        sums = self.matmul.nn(self.refs[2][...], self.matmul.parts(self._log(head), self.parts))
        yield
        chunk = self.blocks.chunk
        return k.astype(jnp.float32) * jnp.exp(sums[:chunk]), jnp.exp(sums[chunk : chunk + 1])

    def write(
        self, matmul: Matmul, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array
    ) -> jax.Array:
        return matmul.tn(x, k_end)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Generator[None, None, Products]:
        matmul, (chunk, size) = self.matmul, q.shape
        n = chunk // SUBLANES
        log = self._log(head)
        sums = matmul.nn(self.refs[1][...], matmul.parts(log, self.parts))
        yield
        q_rows, k_rows = (x.astype(jnp.float32).reshape(n, SUBLANES, size) for x in (q, k))
        row = lax.broadcasted_iota(jnp.int32, (1, SUBLANES, size), 1)
        i, j = indices(chunk, chunk)
        distance = i ^ j  # from b to 2b - 1 at the pairs of level b, if i > j
        # The diagonal; a whole product would only be taken for it.
        P = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), 1, keepdims=True)
        exponents = [jnp.where(row & 1 == 1, log.reshape(n, SUBLANES, size), 0.0)]
        exponents += [
            sums[at : at + chunk].reshape(n, SUBLANES, size) for at in range(0, 4 * chunk, chunk)
        ]
        xs, factors = [], []
        for b, exponent in zip(SMALL_LEVELS, exponents[:3], strict=True):
            factors.append(jnp.exp(exponent))
            X = (
                (jnp.where(row & b == b, q_rows, k_rows) * factors[-1])
                .reshape(chunk, size)
                .astype(matmul.dtype)
            )
            yield
            P_level = matmul.nt(X, X)
            yield
            P = jnp.where(distance >= b, P_level, P)
            xs.append(X)
        prefix, suffix = jnp.exp(exponents[3]), jnp.exp(exponents[4])
        Q, Kd, total = q_rows * prefix, k_rows * suffix, prefix[:, SUBLANES - 1 :]
        totals, b = [], 1  # b in registers of 8 rows
        while b < n:
            pairs = (n // (2 * b), 2, b, SUBLANES)
            Q, Kd = Q.reshape(*pairs, size), Kd.reshape(*pairs, size)
            totals.append(total.reshape(n // (2 * b), 2, 1, 1, size))
            Q2 = Q[:, 1].reshape(chunk // 2, size).astype(matmul.dtype)
            X = jnp.stack([Kd[:, 0], Q[:, 1]], 1).reshape(chunk, size).astype(matmul.dtype)
            yield
            P_level = matmul.nt(Q2, X).reshape(n // (2 * b), b, SUBLANES, chunk)
            first, second = totals[-1][:, 0], totals[-1][:, 1]
            Q = jnp.stack([Q[:, 0], Q[:, 1] * first], 1)
            Kd = jnp.stack([Kd[:, 0] * second, Kd[:, 1]], 1)
            total = first * second
            yield
            P, d = P.reshape(*pairs, chunk), distance.reshape(*pairs, chunk)
            P = jnp.stack([P[:, 0], jnp.where(d[:, 1] >= SUBLANES * b, P_level, P[:, 1])], 1)
            xs.append(X)
            b *= 2
        return Products(
            P.reshape(chunk, chunk) * lower(chunk),
            Q.reshape(chunk, size),
            Kd.reshape(chunk, size),
            total.reshape(1, size),
            VectorSaved(xs, factors, prefix, suffix, totals),
        )

    def adjoint(
        self, head, products, q, k, dscores, dq_start, dk_end, dtotal
    ) -> Generator[None, None, Cotangents]:
        matmul, (chunk, size), saved = self.matmul, q.shape, products.saved
        n = chunk // SUBLANES
        i, j = indices(chunk, chunk)
        diagonal = jnp.sum(jnp.where(i == j, dscores, 0.0), 1, keepdims=True)
        N = jnp.where(i > j, dscores, dscores.T)

        def of_level(b: int, X: jax.Array) -> jax.Array:
            return matmul.nn(N * self.refs[3][b.bit_length() - 1], X)

        dQ, dKd = dq_start, dk_end
        of_total = (dtotal * products.total).reshape(1, 1, size)
        b = n // 2
        for X, totals in zip(saved.xs[:2:-1], saved.totals[::-1], strict=True):
            dX = of_level(SUBLANES * b, X)
            pairs = (n // (2 * b), 2, b, SUBLANES, size)
            dQ, dKd = dQ.reshape(pairs), dKd.reshape(pairs)
            dQ2, dK1 = dQ[:, 1] * totals[:, 0], dKd[:, 0] * totals[:, 1]
            X = X.astype(jnp.float32).reshape(pairs)
            of_second, of_first = (
                (x * dx).sum((1, 2), keepdims=True) for x, dx in ((X[:, 0], dK1), (X[:, 1], dQ2))
            )
            of_total = jnp.stack(
                [of_first[:, 0] + of_total, of_second[:, 0] + of_total], 1
            ).reshape(n // b, 1, size)
            yield
            dX = dX.reshape(pairs)
            dQ = jnp.stack([dQ[:, 0], dQ2 + dX[:, 1]], 1)
            dKd = jnp.stack([dK1 + dX[:, 0], dKd[:, 1]], 1)
            b //= 2

        rows = (n, SUBLANES, size)
        q_rows, k_rows = (x.astype(jnp.float32).reshape(rows) for x in (q, k))
        row = lax.broadcasted_iota(jnp.int32, (1, SUBLANES, size), 1)
        dq, dk = dQ.reshape(rows) * saved.prefix, dKd.reshape(rows) * saved.suffix
        of_prefix, of_suffix = q_rows * dq, k_rows * dk
        of_prefix = jnp.where(row == SUBLANES - 1, of_prefix + of_total, of_prefix)
        of_levels = []
        for b, X, factor in zip(SMALL_LEVELS, saved.xs[:3], saved.factors, strict=True):
            dX = of_level(b, X)
            yield
            of_levels.append(X.astype(jnp.float32) * dX)
            dX = dX.reshape(rows) * factor
            dq, dk = (
                side + jnp.where((row & b == b) == second, dX, 0.0)
                for side, second in ((dq, True), (dk, False))
            )
        log_gradients = [
            *of_levels[1:],
            of_prefix.reshape(chunk, size),
            of_suffix.reshape(chunk, size),
        ]
        dlog = matmul.nn(
            self.refs[2][...], jnp.concatenate([x.astype(matmul.dtype) for x in log_gradients], 0)
        )
        yield
        dlog = dlog.reshape(rows) + jnp.where(row & 1 == 1, of_levels[0].reshape(rows), 0.0)
        diagonal = diagonal.reshape(n, SUBLANES, 1)
        dq, dk = dq + diagonal * k_rows, dk + diagonal * q_rows
        return Cotangents(*(x.reshape(chunk, size) for x in (dq, dk, dlog)))
