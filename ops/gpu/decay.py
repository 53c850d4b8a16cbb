"""Products of decays over the intervals of a chunk, where all channels of a head decay alike.

As in `ops/chunks/chunking.py` a chunk needs, of the decays a_t of its tokens,

    W_ij = a_{j+1} .. a_i  (i >= j)                                                   (1)
    prefix_i = a_0 .. a_i         suffix_j = a_{j+1} .. a_{C-1}                       (2)
    total = a_0 .. a_{C-1}                                                            (3)

and computes them from sums of logs, all of one sign: nothing is subtracted, so nothing cancels, and
no exponent is positive. W is the exponential of L_ij = sum_t [j < t <= i] log a_t, one matmul with
zeros and ones. Where a segment starts, products are set to zero by comparing segment numbers, not
by a log.

With l_t = log a_t, and dW etc. the cotangents of the products, the gradient of the logs is

    dl_t = sum_{j < t <= i} W_ij dW_ij + sum_{i >= t} prefix_i dprefix_i
           + sum_{j < t} suffix_j dsuffix_j + total dtotal                            (4)

A decay for each channel: `channel_decay.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import tiles as gpu


class Segments(NamedTuple):
    """Segment numbers of one chunk."""

    tokens: jax.Array  # [C], of its tokens
    before: jax.Array  # [], of the token before the chunk
    last: jax.Array  # [], of its last token

    @property
    def same(self) -> jax.Array:
        """[C, C] bool: two tokens are in one segment."""
        return self.tokens[:, None] == self.tokens[None, :]

    @property
    def reaches_start(self) -> jax.Array:
        """[C] bool: the token reads the state at the chunk's start."""
        return self.tokens == self.before

    @property
    def reaches_end(self) -> jax.Array:
        """[C] bool: what the token writes is in the state at the chunk's end."""
        return self.tokens == self.last

    @property
    def continues(self) -> jax.Array:
        """[] bool: the state at the chunk's start is in the state at its end."""
        return self.before == self.last


def load_segments(
    ref: Any, batch: Any, start: Any, chunk: int, length: int, reverse: bool
) -> Segments | None:
    """The segments of the chunk that begins with token `start`, in walking order; None without
    segments.

    ref: segment numbers [B, T], or None. Tokens past the end belong to the last token's segment."""
    if ref is None:
        return None
    tokens = jnp.minimum(start + lax.iota(jnp.int32, chunk), length - 1)  # [C]
    before, last = jnp.maximum(start - 1, 0), jnp.minimum(start + chunk, length) - 1
    if reverse:
        tokens, before, last = (length - 1 - x for x in (tokens, before, last))
    return Segments(
        gpu.load(ref, batch, gpu.Span(tokens, None)),
        gpu.load(ref, batch, before),
        gpu.load(ref, batch, last),
    )


class TokenDecay(NamedTuple):
    """Products of the decays of one chunk. None: all ones."""

    weights: jax.Array  # W [C, C], zero above the diagonal
    prefix: jax.Array | None  # [C]
    suffix: jax.Array | None  # [C]
    total: jax.Array | None  # []

    def times_prefix(self, x: jax.Array) -> jax.Array:
        """prefix . x, of x [C, X]."""
        return x if self.prefix is None else x * self.prefix[:, None]

    def times_suffix(self, x: jax.Array) -> jax.Array:
        """suffix . x, of x [C, X]."""
        return x if self.suffix is None else x * self.suffix[:, None]

    def times_total(self, state: jax.Array) -> jax.Array:
        """total S, of a state [K, V]."""
        return state if self.total is None else state * self.total


def token_decay(
    log: jax.Array | None, segments: Segments | None, matmul: gpu.Matmul, chunk: int
) -> TokenDecay:
    """The products of one chunk.

    log: [C] float32, zero for tokens past the end; None: no decay."""
    row, column = gpu.indices(chunk, chunk)
    lower = row >= column
    if log is None:
        weights = jnp.where(lower, 1.0, 0.0)  # [C, C]
        prefix = suffix = total = None
    else:
        log_after = jnp.where(row > column, log[:, None], 0.0)  # [t, j]: log a_t where t > j
        weights = jnp.exp(matmul.masked_sums(lower, log_after))  # [C, C]  Eq. 1
        prefix = jnp.exp(jnp.where(lower, log[None, :], 0.0).sum(1))  # [C]  Eq. 2
        suffix = jnp.exp(log_after.sum(0))  # [C]  Eq. 2
        total = jnp.exp(log.sum(0))  # []  Eq. 3
    if segments is None:
        return TokenDecay(jnp.where(lower, weights, 0.0), prefix, suffix, total)
    ones = jnp.ones((chunk,), jnp.float32)
    return TokenDecay(
        jnp.where(lower & segments.same, weights, 0.0),
        jnp.where(segments.reaches_start, ones if prefix is None else prefix, 0.0),
        jnp.where(segments.reaches_end, ones if suffix is None else suffix, 0.0),
        # NOTE: of two Python numbers the lowering would make a bool.
        jnp.where(segments.continues, jnp.float32(1) if total is None else total, 0.0),
    )


class DecaySums(NamedTuple):
    """What the gradient of the logs needs of a chunk's keys, summed over their channels."""

    prefix_term: jax.Array  # prefix dprefix [C]
    suffix_term: jax.Array  # suffix dsuffix [C]
    dtotal: jax.Array  # []

    @staticmethod
    def zeros(chunk: int) -> "DecaySums":
        return DecaySums(gpu.zeros(chunk), gpu.zeros(chunk), jnp.float32(0))


def token_log_gradient(
    decay: TokenDecay, weights_term: jax.Array, sums: DecaySums, matmul: gpu.Matmul
) -> jax.Array:
    """The gradient of the logs [C], Eq. 4; weights_term: W dW [C, C]."""
    total_term = decay.times_total(sums.dtotal)
    chunk = sums.prefix_term.shape[0]
    row, column = gpu.indices(chunk, chunk)
    from_t_on = matmul.masked_sums(row <= column, weights_term)  # [t, j]: sum over i >= t
    inside = jnp.where(row > column, from_t_on, 0.0).sum(1)  # [C]
    later = jnp.where(row >= column, sums.prefix_term[:, None], 0.0).sum(0)  # [C]
    earlier = jnp.where(row > column, sums.suffix_term[None, :], 0.0).sum(1)  # [C]
    return inside + later + earlier + total_term
