"""Products of decays over intervals inside one chunk, and their adjoint, in what a TPU kernel can
do.

As in `ops/chunks/chunking.py`, W_ij = a_{j+1} .. a_i (i >= j) is never a quotient, an exponent is
never positive, and no sum of logs is ever the difference of two others. There are three kinds of
decay with one interface. `products` gives what the recurrence needs of a chunk,

    P_ij = sum_c q_ic k_jc W_ijc     for i >= j, else 0                                  (1)
    q_start = q . W_(start..i)       k_end = k . W_(j+1..end)     total = W_(start..end) (2)

and `adjoint` takes their gradients to those of q, k and log a. Both are generators (see
`ops/tpu/__init__.py`) that return their result.

**Decay per channel.** The pairs of a chunk are split by halving, b = 1, 2, 4, .. C/2: in a block of
2b tokens, a query of the second half meets the keys of the first with W = suffix_j * prefix_i,
split in the middle. Queries and keys of a level have different rows, so one array holds both:

    X = q . prefix in second halves, k . suffix in first halves                          (3)
    P_level = X X^T                  at the pairs i, j of the level                      (4)
    dX = N X                         with N = dP + dP^T at these pairs                   (5)

Up to b = 4 rows of a block share a register, and the exponents come from one product of 0/1
matrices with log a: sums over exactly the interval's tokens. From b = 8 on whole registers are
multiplied by the product of the neighbouring block, a row: prefix_2b = prefix_b or
total_b prefix_b. The log-gradient of every factor (factor times cotangent) flows back along the
same sums and products.

Above and below, first and last are meant in the order of the walk (`HeadGrid.place`), which in
reverse is not that of rows.

**One decay per token.** The logs are again a product with a 0/1 matrix:

    log W_ij = sum_t (log a_t where t <= i) (1 where t > j)                              (6)
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments
from .heads import HeadGrid, chunk_rows, flat, read
from .kernel import SUBLANES, Input
from .matmul import Matmul

# Where a segment starts the decay is zero: a log that any sum of real ones leaves at exp(.) == 0
# exactly. It is only ever added to other logs, never subtracted.
LOG_ZERO = -1e30
SMALL_LEVELS = (1, 2, 4)  # b of blocks whose rows share a register


Result = TypeVar("Result")
Steps = Generator[None, None, Result]


class Products(NamedTuple):
    """Eqs. 1 and 2 of one head. residuals: what `adjoint` needs besides."""

    scores: jax.Array  # P [C, C], zero for later columns
    q_start: jax.Array  # [C, K]
    k_end: jax.Array  # [C, K]
    total: jax.Array | None  # [1, K or 1], None for no decay
    residuals: Any = None


class Gradients(NamedTuple):
    """Of one head's q, k and log a."""

    q: jax.Array  # [C, K]
    k: jax.Array  # [C, K]
    log: jax.Array | None  # [C, K], or [1, C] for one decay per token, None for no decay


class DecayOfChunk(Protocol):
    """What a kernel asks of the decays of one chunk, for one of its heads; q, k [C, K] are that
    head's. Generators return their result (see `ops/tpu/__init__.py`)."""

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Steps[Products]: ...

    def ends(self, head: int, k: jax.Array) -> Steps[tuple[jax.Array, jax.Array | None]]:
        """k_end and total of `products`, without the rest."""
        ...

    def written(self, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array) -> jax.Array:
        """x^T k_end [V, K], for x [C, V]."""
        ...

    def adjoint(
        self,
        head: int,
        products: Products,
        q: jax.Array,
        k: jax.Array,
        dscores: jax.Array,
        dq_start: jax.Array,
        dk_end: jax.Array,
        dtotal: jax.Array,
    ) -> Steps[Gradients]:
        """Gradients of q, k and log a from those of `products`; dscores does not count for later
        columns, dtotal is [1, K]."""
        ...


def kind_of_decay(
    matmul: Matmul,
    grid: HeadGrid,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    backward: bool = False,
) -> tuple[Any, Any]:
    """The kind of decay and its inputs to a kernel. In the kernel the inputs are a NamedTuple of
    references, of which the kind's `load` makes a `DecayOfChunk`.

    decay_log: None, [H], [B, T, H] or [B, T, H, K]. A constant decay is one per token, the same for
    the whole batch; with segments, no decay becomes one per token too, because a token that starts
    a segment has a decay of zero."""
    if decay_log is not None and decay_log.ndim == 4:
        return VectorDecay.inputs(matmul, grid, decay_log, segment_ids, backward)
    if decay_log is None and segment_ids is None:
        return NoDecay(matmul, grid), None
    if decay_log is None:
        # The same for all blocks of heads.
        log_BHT = jnp.zeros((grid.batch, grid.heads, grid.length), jnp.float32)
    elif decay_log.ndim == 1:
        log_H = decay_log.astype(jnp.float32)
        log_BHT = jnp.broadcast_to(log_H[None, :, None], (1, grid.all_heads, grid.length))
    else:
        log_BHT = decay_log.astype(jnp.float32).swapaxes(1, 2)
    if segment_ids is not None:
        starts = segments.starts(segment_ids, reverse=grid.reverse)
        log_BHT = jnp.where(starts[:, None], LOG_ZERO, log_BHT)
    return ScalarDecay.inputs(matmul, grid, chunk_rows(log_BHT, grid), backward)


# --- No decay


@dataclass(frozen=True)
class NoDecay:
    """Of all chunks and of one."""

    matmul: Matmul
    grid: HeadGrid

    def load(self, refs: None, chunk_index: jax.Array) -> DecayOfChunk:
        return self

    def ends(self, head: int, k: jax.Array) -> Steps[tuple[jax.Array, Any]]:
        yield
        return k, None

    def written(self, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array) -> jax.Array:
        return self.matmul.tn(x, k_end)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Steps[Products]:
        scores = self.matmul.nt(q, k)
        yield
        return Products(scores * self.grid.lower(), q, k, None)

    def adjoint(self, head, products, q, k, dscores, dq_start, dk_end, dtotal) -> Steps[Gradients]:
        dscores = dscores * self.grid.lower()
        dq, dk = self.matmul.nn(dscores, k), self.matmul.tn(dscores, q)
        yield
        return Gradients(dq + dq_start, dk + dk_end, None)


# --- One decay per token and head


class ScalarDecayRefs(NamedTuple):
    rows: Any  # [1, 1, 1, heads, 3C]: log a, prefix and suffix


@dataclass(frozen=True)
class ScalarDecay:
    """One decay per token and head."""

    matmul: Matmul
    grid: HeadGrid

    @staticmethod
    def inputs(
        matmul: Matmul, grid: HeadGrid, log_rows: jax.Array, backward: bool
    ) -> tuple["ScalarDecay", ScalarDecayRefs]:
        """log_rows: [B or 1, n, G, heads, C], 0 where no token is."""
        chunk = grid.chunk
        until = np.tri(chunk, dtype=np.float32)
        until = until.T if grid.reverse else until
        both = np.concatenate([until.T, until - np.eye(chunk, dtype=np.float32)], 1)
        # One plain matrix: XLA takes a product with leading axes for a convolution over them.
        sums = einsum("rt,ti->ri", log_rows.reshape(-1, chunk), both)
        sums = sums.reshape(*log_rows.shape[:-1], 2 * chunk)
        rows = jnp.concatenate([log_rows, jnp.exp(sums)], -1)
        refs = ScalarDecayRefs(Input(rows, grid.rows_tile(rows, backward)))
        return ScalarDecay(matmul, grid), refs

    def load(self, refs: ScalarDecayRefs, chunk_index: jax.Array) -> DecayOfChunk:
        C = self.grid.chunk
        log, prefix, suffix = (refs.rows[0, 0, 0, :, at : at + C] for at in range(0, 3 * C, C))
        total = self.grid.last(prefix, axis=1)
        return ScalarDecayOfChunk(
            self.matmul, self.grid, log, prefix.T, suffix.T, total, suffix_row=suffix
        )


@dataclass(frozen=True)
class ScalarDecayOfChunk:
    matmul: Matmul
    grid: HeadGrid
    log: jax.Array  # [heads, C]
    prefix: jax.Array  # [C, heads]
    suffix: jax.Array  # [C, heads]
    total: jax.Array  # [heads, 1]
    suffix_row: jax.Array  # [heads, C]

    def ends(self, head: int, k: jax.Array) -> Steps[tuple[jax.Array, Any]]:
        yield
        k_end = k.astype(jnp.float32) * self.suffix[:, head : head + 1]  # [C, K]
        return k_end, self.total[head : head + 1]

    def written(self, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array) -> jax.Array:
        # NOTE: as (x^T . suffix) k: a row spreads over registers for less than a column, and x is
        # transposed anyway.
        rows = x.T.astype(jnp.float32) * self.suffix_row[head : head + 1]  # [V, C]
        return self.matmul.nn(rows, k)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Steps[Products]:
        until, logs = self.grid.lower(), self.matmul.terms(self.log[head : head + 1], 2)
        after = jnp.concatenate([self.grid.strictly_lower()] * len(logs), 0)  # [2C, C]
        masked = jnp.concatenate([until * log for log in logs], 1)  # [C, 2C]
        weights_log = self.matmul.nn(masked, after)  # [C, C], Eq. 6
        scores = self.matmul.nt(q, k)  # [C, C]
        yield
        weights = jnp.exp(weights_log) * until
        q_start = q.astype(jnp.float32) * self.prefix[:, head : head + 1]  # [C, K], Eq. 2
        k_end = k.astype(jnp.float32) * self.suffix[:, head : head + 1]  # [C, K], Eq. 2
        yield
        scores = scores * weights  # Eq. 1
        return Products(scores, q_start, k_end, self.total[head : head + 1], residuals=weights)

    def adjoint(self, head, products, q, k, dscores, dq_start, dk_end, dtotal) -> Steps[Gradients]:
        row, column = self.grid.places()
        dweighted = dscores * products.residuals  # [C, C]
        dq, dk = self.matmul.nn(dweighted, k), self.matmul.tn(dweighted, q)  # [C, K]
        # Token t is inside the interval of every pair j < t <= i, in the prefix of i >= t and in
        # the suffix of j < t.
        of_pairs = dscores * products.scores  # factor times cotangent [C, C]
        until = self.matmul.nn(of_pairs, (row < column).astype(jnp.float32))  # [C, C]
        yield
        of_prefix = jnp.sum(products.q_start * dq_start, 1, keepdims=True)  # [C, 1]
        of_suffix = jnp.sum(products.k_end * dk_end, 1, keepdims=True)  # [C, 1]
        dlog = jnp.sum(jnp.where(row >= column, until + of_prefix, of_suffix), 0, keepdims=True)
        dlog += jnp.sum(dtotal, 1, keepdims=True) * products.total  # [1, C]
        dq += dq_start * self.prefix[:, head : head + 1]
        dk += dk_end * self.suffix[:, head : head + 1]
        return Gradients(dq, dk, dlog)


# --- One decay per token, head and channel


def interval_sums(grid: HeadGrid) -> np.ndarray:
    """[4C, C], zeros and ones: which log a to sum for X at b = 2 and 4, and for prefix and suffix
    in blocks of 8."""
    places = grid.place(np.arange(grid.chunk), grid.chunk)
    row, token = places[:, None], places[None]

    def level(b: int) -> np.ndarray:
        middle = row // (2 * b) * 2 * b + b
        from_middle = (middle <= token) & (token <= row)
        to_middle = (row < token) & (token < middle)
        return np.where(row >= middle, from_middle, to_middle)

    same = row // SUBLANES == token // SUBLANES
    sums = [level(2), level(4), same & (token <= row), same & (token > row)]
    return np.concatenate(sums).astype(np.float32)


def end_sums(grid: HeadGrid) -> np.ndarray:
    """[C + 8, C], zeros and ones: which log a to sum for k_end and, in the last 8 rows, total."""
    places = grid.place(np.arange(grid.chunk), grid.chunk)
    after = places[:, None] < places[None]
    return np.concatenate([after, np.ones((SUBLANES, grid.chunk))])


def level_pairs(chunk: int) -> np.ndarray:
    """[levels, C, C]: one where i and j are in different halves of the same block of 2b tokens, b =
    1, 2, 4, .. C/2."""
    distance = np.arange(chunk)[:, None] ^ np.arange(chunk)[None]
    levels = [distance >> level == 1 for level in range(chunk.bit_length() - 1)]
    return np.stack(levels).astype(np.float32)


class VectorDecayRefs(NamedTuple):
    log: Any  # [1, C, heads * K]
    interval_sums: Any  # [4C, terms * C]
    end_sums: Any  # [C + 8, terms * C], forward only
    interval_sums_transposed: Any  # [C, 4C], backward only
    level_pairs: Any  # [levels, C, C], backward only
    starts: Any  # [1, 1, 1, 1, C], one where a segment starts, None without segments


class VectorResiduals(NamedTuple):
    """Of Eq. 3, with n = C / 8."""

    X: list[jax.Array]  # [C, K] per level
    factors: list[jax.Array]  # prefix or suffix [n, 8, K] per small level
    prefix: jax.Array  # of blocks of 8 [n, 8, K]
    suffix: jax.Array  # of blocks of 8 [n, 8, K]
    totals: list[jax.Array]  # per level b >= 8 the decays [n / 2b, 2, 1, 1, K] of its blocks


@dataclass(frozen=True)
class VectorDecay:
    """One decay per token, head and channel.

    terms: how many log a enters a product in (see `Matmul.terms`)."""

    matmul: Matmul
    grid: HeadGrid
    terms: int

    @staticmethod
    def inputs(
        matmul: Matmul,
        grid: HeadGrid,
        decay_log: jax.Array,
        segment_ids: jax.Array | None,
        backward: bool,
    ) -> tuple["VectorDecay", VectorDecayRefs]:
        terms = 1 if matmul.dtype == jnp.float32 or decay_log.dtype == jnp.bfloat16 else 2
        sums = interval_sums(grid)

        def constant(array: np.ndarray, dtype: Any = matmul.dtype) -> Input:
            return grid.constant(jnp.asarray(array, dtype))

        starts = None
        if segment_ids is not None:
            starts = segments.starts(segment_ids, reverse=grid.reverse)
            starts = grid.of_rows(starts[:, None], backward)
        refs = VectorDecayRefs(
            log=Input(flat(decay_log), grid.decay_tile(backward)),
            interval_sums=constant(np.tile(sums, (1, terms))),
            end_sums=None if backward else constant(np.tile(end_sums(grid), (1, terms))),
            interval_sums_transposed=constant(sums.T) if backward else None,
            level_pairs=constant(level_pairs(grid.chunk), jnp.float32) if backward else None,
            starts=starts,
        )
        return VectorDecay(matmul, grid, terms), refs

    def load(self, refs: VectorDecayRefs, chunk_index: jax.Array) -> DecayOfChunk:
        start = None if refs.starts is None else jnp.transpose(refs.starts[0, 0, 0])  # [C, 1]
        valid = self.grid.valid(chunk_index)  # [C, 1]
        return VectorDecayOfChunk(self.matmul, self.grid, self.terms, refs, valid, start)


@dataclass(frozen=True)
class VectorDecayOfChunk:
    matmul: Matmul
    grid: HeadGrid
    terms: int
    refs: VectorDecayRefs
    valid: jax.Array | None  # [C, 1]
    start: jax.Array | None  # [C, 1]

    def _log(self, head: int) -> jax.Array:
        """log a [C, K] of one head."""
        log = read(self.refs.log, head, self.grid.key_size, self.valid).astype(jnp.float32)
        return log if self.start is None else jnp.where(self.start > 0, LOG_ZERO, log)

    def _block_places(self) -> jax.Array:
        """The places of the rows of a block of 8 within it, [1, 8, K]."""
        row = lax.broadcasted_iota(jnp.int32, (1, SUBLANES, self.grid.key_size), 1)
        return self.grid.place(row, SUBLANES)

    def _joined(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """[pairs, 2, ...], in the order of rows, of the halves [pairs, ...] of pairs of blocks."""
        return jnp.stack([second, first] if self.grid.reverse else [first, second], 1)

    def ends(self, head: int, k: jax.Array) -> Steps[tuple[jax.Array, Any]]:
        ends = self.refs.end_sums[...]
        log = self.matmul.stacked_terms(self._log(head), self.terms)  # [terms * C, K]
        sums = self.matmul.nn(ends, log)  # [C + 8, K]
        yield
        C = self.grid.chunk
        return k.astype(jnp.float32) * jnp.exp(sums[:C]), jnp.exp(sums[C : C + 1])

    def written(self, head: int, x: jax.Array, k: jax.Array, k_end: jax.Array) -> jax.Array:
        return self.matmul.tn(x, k_end)

    def products(self, head: int, q: jax.Array, k: jax.Array) -> Steps[Products]:
        matmul, (C, K) = self.matmul, q.shape
        n = C // SUBLANES
        log = self._log(head)  # [C, K]
        intervals = self.refs.interval_sums[...]
        sums = matmul.nn(intervals, matmul.stacked_terms(log, self.terms))  # [4C, K]
        yield
        q_rows, k_rows = (x.astype(jnp.float32).reshape(n, SUBLANES, K) for x in (q, k))
        row = self._block_places()  # [1, 8, K]
        i, j = self.grid.places()
        distance = i ^ j  # from b to 2b - 1 at the pairs of level b, if i > j
        # The diagonal; a whole product would only be taken for it.
        P = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), 1, keepdims=True)  # [C, 1]
        exponents = [jnp.where(row & 1 == 1, log.reshape(n, SUBLANES, K), 0.0)]
        exponents += [sums[at : at + C].reshape(n, SUBLANES, K) for at in range(0, 4 * C, C)]
        X_of_levels, factors = [], []
        for b, exponent in zip(SMALL_LEVELS, exponents[:3], strict=True):
            factors.append(jnp.exp(exponent))  # [n, 8, K]
            X = jnp.where(row & b == b, q_rows, k_rows) * factors[-1]  # [n, 8, K], Eq. 3
            X = X.reshape(C, K).astype(matmul.dtype)
            yield
            P_level = matmul.nt(X, X)  # [C, C], Eq. 4
            yield
            P = jnp.where(distance >= b, P_level, P)
            X_of_levels.append(X)
        prefix, suffix = jnp.exp(exponents[3]), jnp.exp(exponents[4])  # [n, 8, K]
        P, q_start, k_end, total, more_X, totals = yield from self._register_levels(
            P, q_rows * prefix, k_rows * suffix, self.grid.last(prefix, axis=1), distance
        )
        residuals = VectorResiduals(X_of_levels + more_X, factors, prefix, suffix, totals)
        return Products(
            P.reshape(C, C) * self.grid.lower(),
            q_start.reshape(C, K),
            k_end.reshape(C, K),
            total.reshape(1, K),
            residuals,
        )

    def _register_levels(
        self, P: Any, Q: Any, Kd: Any, total: Any, distance: jax.Array
    ) -> Steps[Any]:
        """The levels b >= 8 of `products`.

        P [C, C] of the levels below; Q = q . prefix, Kd = k . suffix [n, 8, K] and total [n, 1, K]
        of blocks of 8. Returns all four of the whole chunk, X of each level, and its totals."""
        matmul, (n, _, K) = self.matmul, Q.shape
        C = n * SUBLANES
        first, second = self.grid.halves
        X_of_levels, totals, b = [], [], 1  # b in registers of 8 rows
        while b < n:
            pairs = (n // (2 * b), 2, b, SUBLANES)
            Q, Kd = Q.reshape(*pairs, K), Kd.reshape(*pairs, K)
            totals.append(total.reshape(n // (2 * b), 2, 1, 1, K))
            Q2 = Q[:, second].reshape(C // 2, K).astype(matmul.dtype)
            X = self._joined(Kd[:, first], Q[:, second])  # Eq. 3
            X = X.reshape(C, K).astype(matmul.dtype)
            yield
            P_level = matmul.nt(Q2, X)  # [C / 2, C], Eq. 4
            P_level = P_level.reshape(n // (2 * b), b, SUBLANES, C)
            total1, total2 = totals[-1][:, first], totals[-1][:, second]  # [n / 2b, 1, 1, K]
            Q = self._joined(Q[:, first], Q[:, second] * total1)
            Kd = self._joined(Kd[:, first] * total2, Kd[:, second])
            total = total1 * total2
            yield
            P, d = P.reshape(*pairs, C), distance.reshape(*pairs, C)
            P2 = jnp.where(d[:, second] >= SUBLANES * b, P_level, P[:, second])
            P = self._joined(P[:, first], P2)
            X_of_levels.append(X)
            b *= 2
        return P, Q, Kd, total, X_of_levels, totals

    def adjoint(self, head, products, q, k, dscores, dq_start, dk_end, dtotal) -> Steps[Gradients]:
        matmul, (C, K), residuals = self.matmul, q.shape, products.residuals
        n = C // SUBLANES
        i, j = self.grid.places()
        diagonal = jnp.sum(jnp.where(i == j, dscores, 0.0), 1, keepdims=True)  # [C, 1]
        N = jnp.where(i > j, dscores, dscores.T)  # [C, C], of all levels together

        def X_gradient(b: int, X: jax.Array) -> jax.Array:
            return matmul.nn(N * self.refs.level_pairs[b.bit_length() - 1], X)  # [C, K], Eq. 5

        of_total = (dtotal * products.total).reshape(1, 1, K)  # factor times cotangent
        dQ, dKd, of_total = yield from self._register_levels_adjoint(
            residuals, X_gradient, dq_start, dk_end, of_total
        )
        rows = (n, SUBLANES, K)
        q_rows, k_rows = (x.astype(jnp.float32).reshape(rows) for x in (q, k))
        row = self._block_places()  # [1, 8, K]
        dq, dk = dQ.reshape(rows) * residuals.prefix, dKd.reshape(rows) * residuals.suffix
        of_prefix, of_suffix = q_rows * dq, k_rows * dk  # factor times cotangent
        of_prefix = jnp.where(row == SUBLANES - 1, of_prefix + of_total, of_prefix)
        of_levels = []
        small = zip(SMALL_LEVELS, residuals.X[:3], residuals.factors, strict=True)
        for b, X, factor in small:
            dX = X_gradient(b, X)
            yield
            of_levels.append(X.astype(jnp.float32) * dX)
            dX = dX.reshape(rows) * factor
            dq = dq + jnp.where(row & b == b, dX, 0.0)
            dk = dk + jnp.where(row & b == 0, dX, 0.0)
        log_gradients = [*of_levels[1:], of_prefix.reshape(C, K), of_suffix.reshape(C, K)]
        intervals = self.refs.interval_sums_transposed[...]
        log_gradients = jnp.concatenate([x.astype(matmul.dtype) for x in log_gradients], 0)
        dlog = matmul.nn(intervals, log_gradients)  # [C, K]
        yield
        dlog = dlog.reshape(rows) + jnp.where(row & 1 == 1, of_levels[0].reshape(rows), 0.0)
        diagonal = diagonal.reshape(n, SUBLANES, 1)
        dq, dk = dq + diagonal * k_rows, dk + diagonal * q_rows
        return Gradients(*(x.reshape(C, K) for x in (dq, dk, dlog)))

    def _register_levels_adjoint(
        self, residuals: VectorResiduals, X_gradient: Any, dQ: Any, dKd: Any, of_total: Any
    ) -> Steps[Any]:
        """Of `_register_levels`: from the gradients of Q, Kd [C, K] and log total [1, 1, K] of the
        whole chunk to those of blocks of 8."""
        C, K = dQ.shape
        n = C // SUBLANES
        first, second = self.grid.halves
        b = n // 2  # in registers of 8 rows
        for X, totals in zip(residuals.X[:2:-1], residuals.totals[::-1], strict=True):
            dX = X_gradient(SUBLANES * b, X)
            pairs = (n // (2 * b), 2, b, SUBLANES, K)
            dQ, dKd = dQ.reshape(pairs), dKd.reshape(pairs)
            dQ2, dK1 = dQ[:, second] * totals[:, first], dKd[:, first] * totals[:, second]
            X = X.astype(jnp.float32).reshape(pairs)
            of_second, of_first = (
                (x * dx).sum((1, 2), keepdims=True)
                for x, dx in ((X[:, first], dK1), (X[:, second], dQ2))
            )  # [n / 2b, 1, 1, K], of log total of each half
            of_total = self._joined(of_first[:, 0] + of_total, of_second[:, 0] + of_total)
            of_total = of_total.reshape(n // b, 1, K)
            yield
            dX = dX.reshape(pairs)
            dQ = self._joined(dQ[:, first], dQ2 + dX[:, second])
            dKd = self._joined(dK1 + dX[:, first], dKd[:, second])
            b //= 2
        return dQ, dKd, of_total
