"""The kinds of decay of a TPU kernel, with the interface of `chunk_products.py` (Eqs. 1 and 2
there): no decay, one per token and head, and one per channel, which is in `channel_decay.py`.

With one decay per token the logs of its products are a product with a 0/1 matrix:

    log W_ij = sum_t (log a_t where t <= i) (1 where t > j)                              (3)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..chunks.chunking import einsum
from ..framework import segments
from .channel_decay import VectorDecay
from .chunk_products import LOG_ZERO, DecayOfChunk, Gradients, Products, Steps
from .heads import HeadGrid, Step
from .kernel import Input
from .matmul import Matmul


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
    return ScalarDecay.inputs(matmul, grid, grid.rows(log_BHT), backward)


# --- No decay


@dataclass(frozen=True)
class NoDecay:
    """Of all chunks and of one."""

    matmul: Matmul
    grid: HeadGrid

    def load(self, refs: None, step: Step) -> DecayOfChunk:
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
        """log_rows: [B or 1, n, G', heads, C], 0 where no token is."""
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

    def load(self, refs: ScalarDecayRefs, step: Step) -> DecayOfChunk:
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
