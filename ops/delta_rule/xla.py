"""The (gated) delta rule by chunks, in plain JAX on every backend.

With S the state at the start of a chunk, S' the one at its end, and the interval products of
`ops/chunks/chunking.py` (W_ij of tokens j+1..i, prefix_i, suffix_j and total; all <= 1):

    Q0   = Q . prefix         K0 = K . prefix         K1 = K . suffix                          (1)
    P_ij = sum_c q_ic k_jc W_ijc  (i >= j)                                                     (2)
    A_ij = beta_i sum_c k_ic k_jc W_ijc  (i > j)      M = (I + A)^-1                           (3)
    N    = M (beta . (V - K0 S))                                                               (4)
    O    = Q0 S + P N                                                                          (5)
    S'   = Diag(total) S + K1^T N                                                              (6)

N are the corrected values that the chunk's tokens write. One scan over the chunks does all of it,
so that what a chunk needs is made and used while it is in cache. M is computed by forward
substitution in diagonal blocks and merging of blocks, never by squaring A: with identical keys the
powers of A overflow float32 while M itself stays below 2.

Backward, with dS' the gradient of S' and D that of beta . (V - K0 S):

    D    = M^T (P^T dO + K1 dS')                                                               (7)
    dS   = Diag(total) dS' + Q0^T dO - K0^T (beta . D)                                         (8)
    dP   = dO N^T  (i >= j)   dA = -D N^T  (i > j)    dV = beta . D                            (9)

and the rest follows from Eq. 1 to 3. Only the inputs are kept; a first scan recomputes the states,
M and N. (Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484,
section 3; with decay: Gated Delta Networks, arXiv 2412.06464.)

With num_segments each segment starts a chunk, and the scan over chunks keeps one state per segment.
States are transposed here, [V, K], and so are arrays whose name ends in T."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..chunks import chunking
from ..chunks.boundaries import Boundaries, boundaries, kept, masks
from ..chunks.chunking import einsum, flip
from ..chunks.segment_states import chunk_owners, scan_segments

SUBSTITUTION = 8  # rows solved one after another; larger blocks are merged by products


def unit_lower_inverse(A: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower-triangular A [..., C, C], C a power of two."""
    *_, chunk, _ = A.shape
    rows = min(SUBSTITUTION, chunk)
    diagonal = jnp.stack(
        [A[..., i : i + rows, i : i + rows] for i in range(0, chunk, rows)], axis=-3
    )
    eye = jnp.broadcast_to(
        jnp.eye(rows, dtype=A.dtype).reshape((1,) * (A.ndim - 1) + (rows, rows)), diagonal.shape
    )
    solved = eye[..., :1, :]
    for r in range(1, rows):
        known = jnp.sum(diagonal[..., r, :r, None] * solved, axis=-2, keepdims=True)
        solved = jnp.concatenate([solved, eye[..., r : r + 1, :] - known], axis=-2)
    for below in chunking.below_blocks(A)[rows.bit_length() - 1 :]:
        first, second = chunking.halves(solved)
        solved = chunking.join(
            solved,
            -einsum("...ij,...jl->...il", second, einsum("...ij,...jl->...il", below, first)),
        )
    return solved[..., 0, :, :]


class _Chunk(NamedTuple):
    """The inputs of one chunk [B, H, C, size] or of all [G, B, H, C, size], in float32, q scaled,
    key heads repeated."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    a: jax.Array | None
    inside: Boundaries | None


def _cut(q, k, v, beta, decay_log, scale, segment_ids, num_segments):
    """The inputs of all chunks, and the cut by segments with `num_segments`."""
    length, heads = v.shape[1:3]
    size = max(k.shape[-1], v.shape[-1])
    chunk, segment_ids, segments = chunking.cut(length, size, segment_ids, num_segments)
    q, k = (chunking.repeat_heads(x, heads) for x in (q, k))
    q, k, v, beta = (
        chunking.to_chunks(x, chunk, segments=segments) for x in (q, k, v, beta[..., None])
    )
    a = chunking.decay_factors(decay_log, segment_ids, chunk, length, segments)
    return _Chunk(q * scale, k, v, beta, a, boundaries(segment_ids, chunk)), segments


def _intervals(chunk: _Chunk):
    """The decay tree, Q0, K0 and K1 (Eq. 1)."""
    if chunk.a is None:
        return None, chunk.q, chunk.k, chunk.k
    tree = chunking.decay_tree(chunk.a)
    from_start, to_end, _ = masks(chunk.inside)
    q0, k0 = (kept(from_start, x * tree.prefix) for x in (chunk.q, chunk.k))
    return tree, q0, k0, kept(to_end, chunk.k * tree.suffix)


def _advance(S, chunk: _Chunk, tree, k0, k1):
    """S' [..., V, K]; K K^T with its decays, M, (V - K0 S)^T and N^T."""
    KK = chunking.lower(chunking.decay_scores(chunk.k, chunk.k, tree), strict=True)
    M = unit_lower_inverse(chunk.beta * KK)  # Eq. 3
    _, to_end, through = masks(chunk.inside)
    missingT = flip(chunk.v) - _read(S, k0, chunk.inside)
    NT = einsum("...vj,...ij->...vi", missingT, M * flip(chunk.beta))  # Eq. 4
    # Eq. 6
    written = einsum("...vc,...ck->...vk", NT if to_end is None else kept(flip(to_end), NT), k1)
    after = (S if tree is None else kept(through, tree.total * S)) + written
    return after, (KK, M, missingT, NT)


def _read(S, rows, inside: Boundaries | None):
    """S rows^T [..., V, C], of the tokens that the state before the chunk reaches."""
    readT = einsum("...vk,...ck->...vc", S, rows)
    return readT if inside is None else kept(flip(inside.from_start), readT)


def forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, num_segments=None):
    """o in float32 and the final state; shapes as in `api.py`."""
    chunks, segments = _cut(q, k, v, beta, decay_log, scale, segment_ids, num_segments)

    def step(S, chunk):
        tree, q0, k0, k1 = _intervals(chunk)
        after, (*_, NT) = _advance(S, chunk, tree, k0, k1)
        P = chunking.decay_scores(chunk.q, chunk.k, tree)  # Eq. 2
        # Eq. 5
        oT = _read(S, q0, chunk.inside) + einsum("...vj,...ij->...vi", NT, P)
        return after, flip(oT)

    final, o = scan_segments(step, flip(initial_state), chunks, chunk_owners(segments))
    return chunking.from_chunks(o, v.shape[1], segments), flip(final)


def backward(
    q,
    k,
    v,
    beta,
    decay_log,
    initial_state,
    segment_ids,
    do,
    dfinal_state,
    *,
    scale,
    num_segments=None,
):
    """Gradients of q, k, v, beta, decay_log and initial_state, in float32."""
    length, key_heads = k.shape[1:3]
    chunks, segments = _cut(q, k, v, beta, decay_log, scale, segment_ids, num_segments)
    owners = chunk_owners(segments)

    def first(S, chunk):
        tree, _, k0, k1 = _intervals(chunk)
        after, made = _advance(S, chunk, tree, k0, k1)
        return after, (S, *made)

    def step(dS, inputs):
        chunk, (S, KK, M, missingT, NT), do = inputs
        q, k, _, beta, a, inside = chunk
        from_start, to_end, through = masks(inside)
        tree, q0, k0, k1 = _intervals(chunk)
        P = chunking.decay_scores(q, k, tree)
        doT = chunking.flipped_copy(do)

        # Eq. 7
        readT = einsum("...vk,...ck->...vc", dS, k1)
        DT = readT if to_end is None else kept(flip(to_end), readT)
        DT += einsum("...vi,...ij->...vj", doT, P)
        DT = einsum("...vi,...ij->...vj", DT, M)
        D, N = chunking.flipped_copy(DT), chunking.flipped_copy(NT)
        # Eq. 8
        fromT = None if from_start is None else flip(from_start)
        before = einsum("...vc,...ck->...vk", kept(fromT, doT), q0) - einsum(
            "...vc,...ck->...vk", kept(fromT, DT * flip(beta)), k0
        )
        before += dS if tree is None else kept(through, tree.total * dS)

        # Eq. 9
        dP = einsum("...iv,...vj->...ij", do, NT)
        dA = -chunking.lower(einsum("...iv,...vj->...ij", D, NT), strict=True)
        dq, dk, scores_P = chunking.decay_scores_gradient(dP, P, q, k, tree)
        dk_row, dk_column, scores_KK = chunking.decay_scores_gradient(beta * dA, KK, k, k, tree)
        dk += dk_row + dk_column
        dq0 = kept(from_start, einsum("...cv,...vk->...ck", do, S))
        dk0 = kept(from_start, -beta * einsum("...cv,...vk->...ck", D, S))
        dk1 = kept(to_end, einsum("...cv,...vk->...ck", N, dS))
        dbeta = (D * flip(missingT)).sum(-1, keepdims=True) + (dA * KK).sum(-1, keepdims=True)
        dg = None
        if a is None or tree is None:
            dq, dk = dq + dq0, dk + dk0 + dk1
        else:
            dq, dk = dq + dq0 * tree.prefix, dk + dk0 * tree.prefix + dk1 * tree.suffix
            if decay_log is not None:
                dtotal = kept(through, tree.total * S * dS).sum(-2, keepdims=True)
                dg = chunking.decay_log_gradient(
                    q0 * dq0 + k0 * dk0, k1 * dk1, dtotal, scores_P, scores_KK, like=a
                )
        return before, (dq * scale, dk, beta * D, dbeta, dg)

    do = chunking.to_chunks(do, chunks.q.shape[-2], segments=segments)
    _, made = scan_segments(first, flip(initial_state), chunks, owners)
    dinitial_state, (*gradients, dg) = scan_segments(
        step, flip(dfinal_state), (chunks, made, do), owners, reverse=True
    )
    dq, dk, dv, dbeta = (chunking.from_chunks(x, length, segments) for x in gradients)
    dq, dk = (chunking.sum_heads(x, key_heads) for x in (dq, dk))
    ddecay_log = (
        None
        if decay_log is None or dg is None
        else chunking.decay_cotangent(dg, decay_log, length, segments)
    )
    return dq, dk, dv, dbeta[..., 0], ddecay_log, flip(dinitial_state)
