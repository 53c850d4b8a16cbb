"""What all chunked forms of matrix-state recurrences share: the cut of time into chunks, and
products of decays over intervals.

Letters: B batch, T time, H heads, C chunk length, G number of chunks, K key, V value, E = K or 1
(decay per channel, or one for all). Arrays cut into chunks are [G, B, H, C, ...]; functions on
chunks accept any leading axes. Values and states are kept transposed ([V, C] and [V, K]; such names
end in T unless they are states), because then every product of a chunked form contracts the columns
of its left factor: XLA's CPU products take up to three times as long when they contract its rows.

**Decays as products.** Token t multiplies the state by a_t = exp(decay_log_t) in [0, 1], and a
token that starts a segment by a_t = 0. Everything a chunked form needs is a product of a over an
interval of tokens,

    W_ij = a_{j+1} a_{j+2} ... a_i   (i >= j),

and `decay_tree` gives all of them without ever dividing, subtracting logs or forming a factor above
1: in a block of 2b tokens each pair with j in the first half and i in the second splits at the
middle,

    W_ij = suffix_j * prefix_i,  suffix_j = a_{j+1} .. a_{middle - 1},  prefix_i = a_middle .. a_i,

so one outer product per level b = 1, 2, 4, .. C/2 covers all pairs i > j of a chunk. The relative
error of W is about log2(C) rounding errors whatever the decays are: -1e4 beside -1e-3 costs
nothing, where differences of cumulative sums lose all digits. Segment boundaries are the factor 0,
exactly.

**Gradient of the log decays.** Each factor used downstream is a product of a's, so its log-gradient
(factor times its cotangent) flows to the sums it was built from; `decay_log_gradient` adds them up,
level by level from the chunk down to the token. Nothing is divided by a_t (which may be 0) and
nothing cancels."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..framework.segments import continues
from .segment_states import SegmentChunks, segment_chunks

# float32 in, float32 out on every backend: the default precision of TPUs and GPUs rounds the
# operands to bf16 or tf32.
einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def chunk_length(length: int, state_size: int) -> int:
    """C, a power of two, for T = `length` and the larger of K and V.

    A token costs about C (K + V) inside its chunk and K V between chunks, balanced at C = K; 64 is
    where the scores stop fitting caches, 16 where products become too small to be fast, and no
    chunk need be longer than the sequence."""
    return min(64, max(16, _power_of_two(state_size)), _power_of_two(length))


def cut(
    length: int, state_size: int, segment_ids: jax.Array | None, num_segments: int | None
) -> tuple[int, jax.Array | None, SegmentChunks | None]:
    """C, the segment ids whose boundaries lie inside chunks, and, where each segment has a state,
    the cut by segments, which leaves no such boundary."""
    if num_segments is None:
        return chunk_length(length, state_size), segment_ids, None
    assert segment_ids is not None
    chunk = chunk_length(-(-length // num_segments), state_size)
    return chunk, None, segment_chunks(segment_ids, num_segments, chunk)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def to_chunks(
    x_BTHX: jax.Array, chunk: int, fill: float = 0.0, segments: SegmentChunks | None = None
) -> jax.Array:
    """[G, B, H, C, X] in float32 of [B, T, H, X]; rows without a token, at the end of time or of a
    segment, are `fill`."""
    x = x_BTHX.astype(jnp.float32)
    if segments is None:
        pad = -x.shape[1] % chunk
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=fill)
    else:
        batch = segments.token.shape[0]
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        rows = x.at[jnp.arange(batch)[:, None], segments.token]
        x = rows.get(mode="fill", fill_value=fill)
    batch, _, heads, size = x.shape
    return x.reshape(batch, -1, chunk, heads, size).transpose(1, 0, 3, 2, 4)


def from_chunks(
    x_GBHCX: jax.Array, length: int, segments: SegmentChunks | None = None
) -> jax.Array:
    """[B, T, H, X] of [G, B, H, C, X]: the inverse of `to_chunks`, without rows that have no
    token."""
    chunks, batch, heads, chunk, size = x_GBHCX.shape
    x = x_GBHCX.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * chunk, heads, size)
    if segments is None:
        return x[:, :length]
    return x[jnp.arange(batch)[:, None], segments.row]


def flip(x: jax.Array) -> jax.Array:
    """The transpose of the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def flipped_copy(x: jax.Array) -> jax.Array:
    """The transpose as an array of its own: behind the barrier XLA cannot fold it into a product
    (see the top)."""
    return lax.optimization_barrier(flip(x))


def repeat_heads(x_BTHX: jax.Array, heads: int) -> jax.Array:
    """[B, T, H, X] of [B, T, HK, X]: value head h reads key head h // (H / HK)."""
    return jnp.repeat(x_BTHX, heads // x_BTHX.shape[2], axis=2)


def sum_heads(x_BTHX: jax.Array, key_heads: int) -> jax.Array:
    """The adjoint of `repeat_heads`: [B, T, HK, X]."""
    batch, length, heads, size = x_BTHX.shape
    return x_BTHX.reshape(batch, length, key_heads, heads // key_heads, size).sum(3)


def decay_factors(
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk: int,
    length: int,
    segments: SegmentChunks | None = None,
) -> jax.Array | None:
    """Per-token factors a [G, B or 1, H or 1, C, E], or None when no token ever decays.

    decay_log: None, [H], [B, T, H] or [B, T, H, K]; segment_ids None or [B, T]. Padding has a = 1:
    it leaves the state alone. With `segments` no boundary lies inside a chunk, and segment_ids must
    be None."""
    if decay_log is None and segment_ids is None:
        return None
    if decay_log is None:
        a_BTHE = jnp.ones((1, length, 1, 1), jnp.float32)
    else:
        a = jnp.exp(decay_log.astype(jnp.float32))
        if a.ndim == 1:
            a_BTHE = jnp.broadcast_to(a.reshape(1, 1, -1, 1), (1, length, a.size, 1))
        else:
            a_BTHE = a if a.ndim == 4 else a[..., None]
    if segment_ids is not None:
        a_BTHE = jnp.where(continues(segment_ids)[:, :, None, None], a_BTHE, 0.0)
    return to_chunks(a_BTHE, chunk, fill=1.0, segments=segments)


def decay_cotangent(
    dg_GBHCE: jax.Array, decay_log: jax.Array, length: int, segments: SegmentChunks | None = None
) -> jax.Array:
    """The gradient of `decay_log` from that of the logs of `decay_factors`."""
    dg_BTHE = from_chunks(dg_GBHCE, length, segments)
    return dg_BTHE.sum((0, 1, 3)) if decay_log.ndim == 1 else dg_BTHE.reshape(decay_log.shape)


class DecayTree(NamedTuple):
    """Interval products of one chunk (see the top of the file); E = K or 1.

    levels: for each block length b = 1, 2, 4, .. C/2 the prefix of the second halves and the suffix
      of the first, [..., C/2b, b, E] each.
    prefix: [..., C, E], from the start of the chunk up to the token, itself included.
    suffix: [..., C, E], from the token, itself excluded, to the end of the chunk.
    total: [..., 1, E], of the whole chunk."""

    levels: Sequence[tuple[jax.Array, jax.Array]]
    prefix: jax.Array
    suffix: jax.Array
    total: jax.Array


def decay_tree(a: jax.Array) -> DecayTree:
    """The interval products of a [..., C, E], C a power of two."""
    *leading, chunk, size = a.shape
    prefix = a.reshape(*leading, chunk, 1, size)
    suffix = jnp.ones_like(prefix)
    levels = []
    block = 1
    while block < chunk:
        prefix1, prefix2 = halves(prefix)
        suffix1, suffix2 = halves(suffix)
        levels.append((prefix2, suffix1))
        prefix = jnp.concatenate([prefix1, prefix1[..., -1:, :] * prefix2], axis=-2)
        suffix = jnp.concatenate([suffix1 * prefix2[..., -1:, :], suffix2], axis=-2)
        block *= 2
    prefix, suffix = prefix[..., 0, :, :], suffix[..., 0, :, :]
    return DecayTree(levels, prefix, suffix, prefix[..., -1:, :])


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The n even and the n odd blocks [..., n, b, X] of [..., 2n, b, X]."""
    *leading, blocks, block, size = x.shape
    x = x.reshape(*leading, blocks // 2, 2, block, size)
    return x[..., 0, :, :], x[..., 1, :, :]


def split(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The first and the second halves [..., C/2b, b, X] of all blocks of 2b rows of [..., C, X]."""
    *leading, chunk, size = x.shape
    x = x.reshape(*leading, chunk // (2 * block), 2, block, size)
    return x[..., 0, :, :], x[..., 1, :, :]


def merge(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `split`: [..., C, X]."""
    *leading, blocks, block, size = first.shape
    return jnp.stack([first, second], axis=-3).reshape(*leading, 2 * blocks * block, size)


def join(diagonal: jax.Array, below: jax.Array) -> jax.Array:
    """Block lower-triangular [..., n, 2b, 2b]: diagonal blocks [..., 2n, b, b], blocks below them
    [..., n, b, b]."""
    first, second = halves(diagonal)
    top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def below_blocks(x: jax.Array) -> list[jax.Array]:
    """[..., C, C] -> per level b = 1, 2, .. C/2 the blocks [..., C/2b, b, b] that `join` places
    below the diagonal."""
    blocks = x[..., None, :, :]
    result = []
    while (size := blocks.shape[-1]) > 1:
        b = size // 2
        result.append(blocks[..., b:, :b])
        blocks = jnp.stack([blocks[..., :b, :b], blocks[..., b:, b:]], axis=-3)
        blocks = blocks.reshape(*blocks.shape[:-4], -1, b, b)
    return result[::-1]


def lower(x: jax.Array, strict: bool = False) -> jax.Array:
    """The lower triangle of [..., C, C], zero above; without the diagonal if `strict`."""
    row, column = _indices(x)
    return jnp.where(row > column if strict else row >= column, x, 0.0)


def _indices(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of [..., C, C], with x's rank."""
    shape = (1,) * (x.ndim - 2) + x.shape[-2:]
    return lax.broadcasted_iota(jnp.int32, shape, x.ndim - 2), lax.broadcasted_iota(
        jnp.int32, shape, x.ndim - 1
    )


def _interval_matrix(tree: DecayTree) -> jax.Array:
    """W [..., C, C] for one decay per token (E = 1), zero above the diagonal."""
    outer = tree.prefix * flip(tree.suffix)
    row, column = _indices(outer)
    W = jnp.where(row == column, jnp.ones_like(outer), 0.0)
    for level, (prefix, suffix) in enumerate(tree.levels):
        prefix, suffix = (
            merge(jnp.zeros_like(prefix), prefix),
            merge(suffix, jnp.zeros_like(suffix)),
        )
        same_block = row >> (level + 1) == column >> (level + 1)
        W += jnp.where(same_block, prefix * flip(suffix), 0.0)
    return W


def decay_scores(q: jax.Array, k: jax.Array, tree: DecayTree | None) -> jax.Array:
    """P_ij = sum_c q_ic k_jc W_ijc for i >= j, zero above: [..., C, C], of q and k [..., C, K]."""
    if tree is None or tree.prefix.shape[-1] == 1:
        P = einsum("...ik,...jk->...ij", q, k)
        return lower(P) if tree is None else P * _interval_matrix(tree)
    P = jnp.sum(q * k, axis=-1)[..., None, None]
    for level, (prefix, suffix) in enumerate(tree.levels):
        _, q2 = split(q, 1 << level)
        k1, _ = split(k, 1 << level)
        P = join(P, einsum("...ik,...jk->...ij", q2 * prefix, k1 * suffix))
    return P[..., 0, :, :]


class ScoreGradient(NamedTuple):
    """The log-gradient of the decays in `decay_scores`, in one of two forms.

    levels: of a decay per channel: for each level of the tree that of the prefix of the second
      halves and that of the suffix of the first.
    tokens: of one decay per token: [..., C, 1], that of each token."""

    levels: Sequence[tuple[jax.Array, jax.Array]] = ()
    tokens: jax.Array | None = None


def decay_scores_gradient(
    dP: jax.Array, P: jax.Array, q: jax.Array, k: jax.Array, tree: DecayTree | None
) -> tuple[jax.Array, jax.Array, ScoreGradient]:
    """Gradients of q and k, and the log-gradient of the decays, from the gradient dP of P =
    `decay_scores(q, k, tree)`. dP may hold anything above the diagonal."""
    if tree is None:
        dP = lower(dP)
        dq, dk = (
            einsum("...ij,...jk->...ik", dP, k),
            einsum("...ji,...ik->...jk", flipped_copy(dP), q),
        )
        return dq, dk, ScoreGradient()
    if tree.prefix.shape[-1] == 1:
        dP_W = dP * _interval_matrix(tree)
        dq, dk = (
            einsum("...ij,...jk->...ik", dP_W, k),
            einsum("...ji,...ik->...jk", flipped_copy(dP_W), q),
        )
        # Token t is inside the interval of every pair j < t <= i.
        before = 1.0 - jnp.tri(dP.shape[-1], dtype=dP.dtype)
        until = einsum("...ij,jt->...it", dP * P, before)
        return dq, dk, ScoreGradient(tokens=lower(until).sum(-2)[..., None])
    diagonal = jnp.diagonal(dP, axis1=-2, axis2=-1)[..., None]
    dq, dk = diagonal * k, diagonal * q
    levels = []
    for level, (dP_b, (prefix, suffix)) in enumerate(
        zip(below_blocks(dP), tree.levels, strict=True)
    ):
        block = 1 << level
        _, q2 = split(q, block)
        k1, _ = split(k, block)
        dq2 = einsum("...ij,...jk->...ik", dP_b, k1 * suffix) * prefix
        dk1 = einsum("...ji,...ik->...jk", flipped_copy(dP_b), q2 * prefix) * suffix
        dq += merge(jnp.zeros_like(dq2), dq2)
        dk += merge(dk1, jnp.zeros_like(dk1))
        levels.append((q2 * dq2, k1 * dk1))
    return dq, dk, ScoreGradient(levels=levels)


def decay_log_gradient(
    prefix: jax.Array, suffix: jax.Array, total: jax.Array, *scores: ScoreGradient, like: jax.Array
) -> jax.Array:
    """The gradient of log a [..., C, E] from the log-gradients of everything that `decay_tree`
    returned.

    prefix, suffix [..., C, K], total [..., 1, K]: factor times gradient of each.
    scores: from `decay_scores_gradient`.
    like: the factors a; the result is summed over axes of size 1 (E, batch or heads that share)."""

    def channels(x: jax.Array) -> jax.Array:
        return x.sum(-1, keepdims=True) if like.shape[-1] == 1 else x

    def at_last(x: jax.Array, rows: int) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(rows - 1, 0), (0, 0)])

    prefix, suffix = channels(prefix), channels(suffix)
    prefix = (prefix + at_last(channels(total), prefix.shape[-2]))[..., None, :, :]
    suffix = suffix[..., None, :, :]
    while (block := prefix.shape[-2] // 2) >= 1:
        (prefix1, prefix2), (suffix1, suffix2) = (
            (x[..., :block, :], x[..., block:, :]) for x in (prefix, suffix)
        )
        # The prefix of a second half holds all of the first half, the suffix of a first half all of
        # the second.
        whole1, whole2 = prefix2.sum(-2, keepdims=True), suffix1.sum(-2, keepdims=True)
        for levels, _ in scores:
            if levels:
                of_prefix, of_suffix = levels[block.bit_length() - 1]
                prefix2, suffix1 = prefix2 + of_prefix, suffix1 + of_suffix
        prefix = jnp.stack(
            [prefix1 + at_last(whole1, block), prefix2 + at_last(whole2, block)], axis=-3
        )
        suffix = jnp.stack([suffix1, suffix2], axis=-3)
        prefix, suffix = (
            x.reshape(*x.shape[:-4], -1, block, x.shape[-1]) for x in (prefix, suffix)
        )
    dg = prefix[..., 0, :]
    for _, tokens in scores:
        if tokens is not None:
            dg += tokens
    broadcast = tuple(like.ndim + axis for axis in (-4, -3) if like.shape[axis] == 1)
    return dg.sum(broadcast, keepdims=True) if broadcast else dg
