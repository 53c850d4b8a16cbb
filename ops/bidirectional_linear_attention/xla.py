"""Linear attention to all tokens in plain JAX on every backend, forward and backward.

With v' = (v, 1), the values and a column of ones, and j ~ i for keys j that the query i sees,

    n_i = sum_{j ~ i} (q_i k_j) v'_j        o_i = n_i but its last entry, over the last + eps   (1)

so that the denominator is one more column. n is linear in q, k and v', and ~ is as good read from
the other side: with dn the gradient of n,

    dq_i = sum_{j ~ i} (dn_i v'_j) k_j      dk_j = sum_{i ~ j} (v'_j dn_i) q_i
    dv'_j = sum_{i ~ j} (k_j q_i) dn_i                                                          (2)

are three sums of the same kind, two of them over the same pairs (q_i, dn_i). What is needed of all
pairs (x_j, y_j) to read sum_{j ~ i} (z_i x_j) y_j for any z is a `Sums`:

    Whole    sum_j x_j^T y_j, where everything sees everything
    Pairs    the pairs themselves, where they are so few that z x^T is cheaper
    Chunks   of packed documents: time in chunks of C tokens, of each its pairs, which see each
             other within a segment, and the sums x^T y over what the segment of its first token has
             before the chunk and that of its last token behind it

Rows are those of tokens times the R query heads that read one key head, of keys times one.

Letters: B batch, T time, M key heads, R, N rows, G chunks, C tokens of a chunk, X and Y sizes."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import chunk_length, einsum, flip
from ..framework import segments


class Others(Protocol):
    """What other devices have of the same sequences."""

    def total(self, own: jax.Array) -> jax.Array:
        """The sum over all devices."""
        ...

    def around(self, head: jax.Array, tail: jax.Array, number: jax.Array) -> tuple[Any, Any]:
        """The sums [B, M, X, Y] of what the segments of the first and of the last token have before
        and behind this device's tokens; None for nothing.

        head, tail: the sums over these segments here; number: [B, T], numbers of segments."""
        ...


class _Nobody:
    def total(self, own: jax.Array) -> jax.Array:
        return own

    def around(self, head: jax.Array, tail: jax.Array, number: jax.Array) -> tuple[Any, Any]:
        del head, tail, number
        return None, None


NOBODY: Others = _Nobody()


class Whole(NamedTuple):
    """state: [B, M, X, Y], sum_j x_j^T y_j."""

    state: jax.Array

    @property
    def transposed(self) -> "Whole":
        return Whole(flip(self.state))

    def read(self, z: jax.Array) -> jax.Array:
        """sum_j (z_i x_j) y_j [B, M, N, Y] of z [B, M, N, X]."""
        return einsum("bmnx,bmxy->bmny", z, self.state)


class Pairs(NamedTuple):
    """x, y: [B, M, N, X | Y]."""

    x: jax.Array
    y: jax.Array

    @property
    def transposed(self) -> "Pairs":
        return Pairs(self.y, self.x)

    def read(self, z: jax.Array) -> jax.Array:
        """As `Whole.read`."""
        return einsum("bmns,bmsy->bmny", einsum("bmnx,bmsx->bmns", z, self.x), self.y)


class Chunks(NamedTuple):
    """x, y: [G, B, M, C R, X | Y]; before, behind: [G, B, M, X, Y].

    number: [G, B, C], numbers of segments."""

    x: jax.Array
    y: jax.Array
    before: jax.Array
    behind: jax.Array
    number: jax.Array

    @property
    def transposed(self) -> "Chunks":
        return Chunks(self.y, self.x, flip(self.before), flip(self.behind), self.number)

    def read(self, z: jax.Array) -> jax.Array:
        """sum_{j ~ i} (z_i x_j) y_j [G, B, M, C R, Y] of z [G, B, M, C R, X]."""
        of_z, of_x = (_of_rows(self.number, rows.shape[-2]) for rows in (z, self.x))
        sees = of_z[:, :, None, :, None] == of_x[:, :, None, None, :]
        scores = jnp.where(sees, einsum("gbmnx,gbmsx->gbmns", z, self.x), 0.0)
        n = einsum("gbmns,gbmsy->gbmny", scores, self.y)
        for index, state in ((0, self.before), (-1, self.behind)):
            reached = _only(of_z == self.number[..., index, None], z)
            n += einsum("gbmnx,gbmxy->gbmny", reached, state)
        return n


class _Plan(NamedTuple):
    """How the sums are formed: in chunks of so many tokens with these numbers of segments [B, T]
    and [G, B, C], else in pairs or whole."""

    chunk: int | None
    number: Any
    in_chunks: Any
    in_pairs: bool

    def rows(self, x: jax.Array, key_heads: int) -> jax.Array:
        """[B, M, T R, X], or in chunks [G, B, M, C R, X], of x [B, T, M R, X]; float32."""
        batch, length, heads, size = x.shape
        chunk = self.chunk or length
        chunks, group = -(-length // chunk), heads // key_heads
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
        x = x.reshape(batch, chunks, chunk, key_heads, group, size).transpose(1, 0, 3, 2, 4, 5)
        x = x.reshape(chunks, batch, key_heads, chunk * group, size)
        return x if self.chunk else x[0]

    def tokens(self, rows: jax.Array, length: int, heads: int) -> jax.Array:
        """The inverse of `rows`: [B, T, M R, X]."""
        rows = rows if self.chunk else rows[None]
        chunks, batch, key_heads, _, size = rows.shape
        chunk, group = self.chunk or length, heads // key_heads
        x = rows.reshape(chunks, batch, key_heads, chunk, group, size).transpose(1, 0, 3, 2, 4, 5)
        return x.reshape(batch, chunks * chunk, heads, size)[:, :length]


def _plan(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Any, others: Others) -> _Plan:
    if segment_ids is None:
        return _Plan(None, None, None, others is NOBODY and pairs_are_cheaper(q, k, v))
    length = q.shape[1]
    chunk = chunk_length(length, max(k.shape[-1], v.shape[-1]))
    number = segments.numbers(segment_ids)
    # Rows that fill up the last chunk hold zeros and belong to the last segment.
    padded = jnp.pad(number, ((0, 0), (0, -length % chunk)), mode="edge")
    in_chunks = jnp.swapaxes(padded.reshape(len(q), padded.shape[1] // chunk, chunk), 0, 1)
    return _Plan(chunk, number, in_chunks, False)


def pairs_are_cheaper(q: Any, k: Any, v: Any) -> bool:
    """Whether (q k^T) v takes fewer multiplications than q (k^T v)."""
    (queries, heads, K), (keys, key_heads, V) = q.shape[1:], v.shape[1:]
    return heads * queries * keys * (K + V) <= K * V * (key_heads * keys + heads * queries)


def _of_rows(number: jax.Array, rows: int) -> jax.Array:
    """Numbers [..., C R] of rows, given those of C tokens."""
    return jnp.repeat(number, rows // number.shape[-1], axis=-1)


def _only(keep: jax.Array, x: jax.Array) -> jax.Array:
    """x [..., M, N, X], zero where keep [..., N] is false."""
    return jnp.where(keep[..., None, :, None], x, 0.0)


def carried(
    sums: jax.Array, one_segment: jax.Array, goes_on: jax.Array, first: Any, reverse: bool = False
) -> jax.Array:
    """What reaches each of N consecutive parts of time of the segment of its first token: [N, B, M,
    X, Y].

    sums: [N, B, M, X, Y] over the segment of the last token of each part; one_segment: [N, B],
    whether it is that of its first token too; goes_on: [N - 1, B], whether it goes on in the next
    part; first: what reaches the first part. In reverse, read first and last the other way round.
    """
    ends = jnp.zeros((1, *goes_on.shape[1:]), bool)  # the walk ends with the last part
    goes_on = jnp.concatenate([ends, goes_on] if reverse else [goes_on, ends])

    def step(state: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        own, one_segment, goes_on = part
        left = own + jnp.where(one_segment[:, None, None, None], state, 0.0)
        return jnp.where(goes_on[:, None, None, None], left, 0.0), state

    first = jnp.zeros(sums.shape[1:]) if first is None else first
    return lax.scan(step, first, (sums, one_segment, goes_on), reverse=reverse)[1]


def _outside(plan: _Plan, x: jax.Array, y: jax.Array, others: Others) -> Any:
    """What `_sums` needs of other devices, and where all sees all, the sum itself."""
    if plan.in_pairs:
        return None
    if plan.chunk is None:
        return others.total(einsum("bmnx,bmny->bmxy", x, y))
    if others is NOBODY:
        return None, None
    rows = _of_rows(plan.in_chunks, x.shape[-2])
    head, tail = (
        einsum("gbmnx,gbmny->bmxy", _only(rows == plan.number[None, :, index, None], x), y)
        for index in (0, -1)
    )
    return others.around(head, tail, plan.number)


def _sums(plan: _Plan, x: jax.Array, y: jax.Array, outside: Any) -> Whole | Pairs | Chunks:
    if plan.in_pairs:
        return Pairs(x, y)
    if plan.chunk is None:
        return Whole(outside)
    number, rows = plan.in_chunks, _of_rows(plan.in_chunks, x.shape[-2])
    first, last = number[..., 0], number[..., -1]
    head, tail = (
        einsum("gbmnx,gbmny->gbmxy", _only(rows == of[..., None], x), y) for of in (first, last)
    )
    one_segment, goes_on = first == last, last[:-1] == first[1:]
    before = carried(tail, one_segment, goes_on, outside[0])
    behind = carried(head, one_segment, goes_on, outside[1], reverse=True)
    return Chunks(x, y, before, behind, number)


def _rows_of(plan: _Plan, q, k, v, key_mask, normalise):
    """Rows of q, k and v', zeros for keys that are not there: their gradients are zeros too."""
    key_heads = k.shape[2]
    if normalise:
        v = v.astype(jnp.float32)
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)
    k, v = (_there(key_mask, x) for x in (k, v))
    return tuple(plan.rows(x, key_heads) for x in (q, k, v))


def _there(key_mask: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if key_mask is None else jnp.where(key_mask[..., None, None], x, 0)


def _inverse(n: jax.Array, eps: float) -> jax.Array:
    """One over the denominator, zero where it is zero."""
    denominator = n[..., -1:] + eps
    there = denominator != 0
    return jnp.where(there, 1.0 / jnp.where(there, denominator, 1.0), 0.0)


def outputs(inputs: Any, others: Others, *, normalise: bool, eps: float) -> tuple[jax.Array, Any]:
    """o in float32, and what came from other devices."""
    q, k, v, key_mask, segment_ids = inputs
    plan = _plan(q, k, v, segment_ids, others)
    x, k_rows, v_rows = _rows_of(plan, q, k, v, key_mask, normalise)
    outside = _outside(plan, k_rows, v_rows, others)
    n = _sums(plan, k_rows, v_rows, outside).read(x)
    if normalise:  # Eq. 1
        n = n[..., :-1] * _inverse(n, eps)
    return plan.tokens(n, q.shape[1], q.shape[2]), outside


def gradients(
    inputs: Any, outside: Any, do: jax.Array, others: Others, *, normalise: bool, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, float32.

    outside: what came from other devices, None to ask again."""
    q, k, v, key_mask, segment_ids = inputs
    plan = _plan(q, k, v, segment_ids, others)
    x, k_rows, v_rows = _rows_of(plan, q, k, v, key_mask, normalise)
    if outside is None:
        outside = _outside(plan, k_rows, v_rows, others)
    sums = _sums(plan, k_rows, v_rows, outside)
    dn = plan.rows(do, k.shape[2])
    if normalise:
        n = sums.read(x)
        inverse = _inverse(n, eps)
        dn = dn * inverse
        dn = jnp.concatenate([dn, -(dn * n[..., :-1] * inverse).sum(-1, keepdims=True)], axis=-1)
    # Eq. 2
    of_queries = _sums(plan, x, dn, _outside(plan, x, dn, others))
    dq, dk, dv = (
        sums.transposed.read(dn),
        of_queries.transposed.read(v_rows),
        of_queries.read(k_rows),
    )
    dq, dk, dv = (plan.tokens(rows, *like.shape[1:3]) for rows, like in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv[..., : v.shape[-1]]


def forward(q, k, v, key_mask, segment_ids, *, normalise, eps):
    """(o,) in float32; shapes as in `api.py`."""
    inputs = (q, k, v, key_mask, segment_ids)
    return (outputs(inputs, NOBODY, normalise=normalise, eps=eps)[0],)


def backward(q, k, v, key_mask, segment_ids, do, *, normalise, eps):
    """Gradients of q, k and v, float32."""
    inputs = (q, k, v, key_mask, segment_ids)
    return gradients(inputs, None, do, NOBODY, normalise=normalise, eps=eps)
