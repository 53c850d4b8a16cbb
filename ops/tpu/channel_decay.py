"""Products of decays over the intervals of a chunk where each channel has its own, in what a TPU
kernel can do, with the interface of `chunk_products.py` (Eqs. 1 and 2 there).

The pairs of a chunk are split by halving, b = 1, 2, 4, .. C/2: in a block of 2b tokens, a query of
the second half meets the keys of the first with W = suffix_j * prefix_i, split in the middle.
Queries and keys of a level have different rows, so one array holds both:

    X = q . prefix in second halves, k . suffix in first halves                          (3)
    P_level = X X^T                  at the pairs i, j of the level                      (4)
    dX = N X                         with N = dP + dP^T at these pairs                   (5)

Up to b = 4 rows of a block share a register, and the exponents come from one product of 0/1
matrices with log a: sums over exactly the interval's tokens. From b = 8 on whole registers are
multiplied by the product of the neighbouring block, a row: prefix_2b = prefix_b or
total_b prefix_b. The log-gradient of every factor (factor times cotangent) flows back along the
same sums and products.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..framework import segments
from .chunk_products import LOG_ZERO, DecayOfChunk, Gradients, Products, Steps
from .heads import HeadGrid, Step, flat, read
from .kernel import SUBLANES, Input
from .matmul import Matmul

SMALL_LEVELS = (1, 2, 4)  # b of blocks whose rows share a register


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

    def load(self, refs: VectorDecayRefs, step: Step) -> DecayOfChunk:
        start = None if refs.starts is None else jnp.transpose(refs.starts[0, 0, 0])  # [C, 1]
        valid = step.valid()  # [C, 1]
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
