"""Gated linear attention by chunks, in plain JAX on every backend.

With S the state at the start of a chunk of C tokens, S' the one at its end, and W_ij the product of
the decays of tokens j+1..i, of which prefix_i, suffix_j and total are those from the chunk's start
to i, from j to its end and over all of it (all <= 1, see `ops/chunks/chunking.py`):

    P_ij = sum_c q_ic k_jc W_ijc  (i >= j)                                                     (1)
    O    = (Q . prefix) S + P V                                                                (2)
    S'   = Diag(total) S + (K . suffix)^T V                                                    (3)

Only Eq. 3 is sequential over chunks, and there elementwise. Backward, with dS' the gradient of S':

    dS   = Diag(total) dS' + (Q . prefix)^T dO                                                 (4)
    dP   = dO V^T  (i >= j)                                                                    (5)
    dV   = (K . suffix) dS' + P^T dO                                                           (6)
    dQ   = prefix . (dO S^T) + what Eq. 1 makes of dP                                          (7)
    dK   = suffix . (V dS'^T) + what Eq. 1 makes of dP                                         (8)

and the gradient of a log decay is the sum of factor times gradient over the products that contain
it. The backward pass recomputes the chunk states: only the inputs are kept. (Yang et al., Gated
Linear Attention, arXiv 2312.06635, section 4; the exact products by halving instead of their
secondary chunking.)

With num_segments each segment starts a chunk, and the scan over chunks keeps one state per segment.
States are transposed here, [V, K], and so are arrays whose name ends in T."""

from ..chunks import chunking
from ..chunks.boundaries import Boundaries, boundaries, kept, masks
from ..chunks.chunking import einsum, flip
from ..chunks.segment_states import chunk_owners, scan_segments


def _cut(q, k, v, decay_log, scale, segment_ids, num_segments):
    """q, k, v [G, B, H, C, K or V], q scaled, the decays a of tokens, the cut by segments, and the
    boundaries inside chunks."""
    length, heads = v.shape[1:3]
    size = max(k.shape[-1], v.shape[-1])
    chunk, segment_ids, segments = chunking.cut(length, size, segment_ids, num_segments)
    q, k = (chunking.repeat_heads(x, heads) for x in (q, k))
    q, k, v = (chunking.to_chunks(x, chunk, segments=segments) for x in (q, k, v))
    a = chunking.decay_factors(decay_log, segment_ids, chunk, length, segments)
    return q * scale, k, v, a, segments, boundaries(segment_ids, chunk)


def _read_write(q, k, a, inside: Boundaries | None):
    """The decay tree, Q . prefix and K . suffix [..., C, K], and total [..., 1, K or 1]."""
    if a is None:
        return None, q, k, None
    tree = chunking.decay_tree(a)
    from_start, to_end, _ = masks(inside)
    return tree, kept(from_start, q * tree.prefix), kept(to_end, k * tree.suffix), tree.total


def _states(k_end, vT, total, initial_state, segments, inside: Boundaries | None):
    """The state at the start of each chunk [G, B, H, V, K], and after the last [B, H, K, V] or, of
    each segment, [B, S, H, K, V]."""
    _, to_end, through = masks(inside)
    written = einsum("...vc,...ck->...vk", vT if to_end is None else kept(flip(to_end), vT), k_end)

    def step(S, chunk):
        written, total, through = chunk
        return (S if total is None else kept(through, total * S)) + written, S  # Eq. 3

    chunks = written, total, through
    final, S = scan_segments(step, flip(initial_state), chunks, chunk_owners(segments))
    return S, flip(final)


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, num_segments=None):
    """o in float32 and the final state; shapes as in `api.py`."""
    length = v.shape[1]
    q, k, v, a, segments, inside = _cut(q, k, v, decay_log, scale, segment_ids, num_segments)
    tree, q_start, k_end, total = _read_write(q, k, a, inside)
    S, final_state = _states(k_end, flip(v), total, initial_state, segments, inside)
    P = chunking.decay_scores(q, k, tree)  # Eq. 1
    # Eq. 2
    carriedT = einsum("...vk,...ck->...vc", S, q_start)
    oT = carriedT if inside is None else kept(flip(inside.from_start), carriedT)
    oT += einsum("...vj,...ij->...vi", flip(v), P)
    return chunking.from_chunks(flip(oT), length, segments), final_state


def backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, num_segments=None
):
    """Gradients of q, k, v, decay_log and initial_state, in float32."""
    length, key_heads = k.shape[1:3]
    q, k, v, a, segments, inside = _cut(q, k, v, decay_log, scale, segment_ids, num_segments)
    from_start, to_end, through = masks(inside)
    do = chunking.to_chunks(do, q.shape[-2], segments=segments)
    tree, q_start, k_end, total = _read_write(q, k, a, inside)
    vT, doT = flip(v), flip(do)
    S, _ = _states(k_end, vT, total, initial_state, segments, inside)
    read = einsum("...vc,...ck->...vk", flip(kept(from_start, do)), q_start)

    def step(dS, chunk):
        read, total, through = chunk
        return (dS if total is None else kept(through, total * dS)) + read, dS  # Eq. 4

    chunks = read, total, through
    dinitial_state, dS = scan_segments(
        step, flip(dfinal_state), chunks, chunk_owners(segments), reverse=True
    )

    P = chunking.decay_scores(q, k, tree)
    dP = einsum("...iv,...vj->...ij", do, vT)  # Eq. 5
    dq, dk, scores = chunking.decay_scores_gradient(dP, P, q, k, tree)
    dq_start = kept(from_start, einsum("...cv,...vk->...ck", do, S))
    dk_end = kept(to_end, einsum("...cv,...vk->...ck", v, dS))
    # Eq. 6
    dvT = einsum("...vk,...ck->...vc", dS, k_end)
    dvT = dvT if to_end is None else kept(flip(to_end), dvT)
    dvT += einsum("...vi,...ij->...vj", doT, P)
    ddecay_log = None
    if a is None or tree is None:
        dq, dk = dq + dq_start, dk + dk_end
    else:
        dq, dk = dq + dq_start * tree.prefix, dk + dk_end * tree.suffix  # Eq. 7 and 8
        if decay_log is not None:
            dtotal = kept(through, total * S * dS).sum(-2, keepdims=True)
            dg = chunking.decay_log_gradient(
                q_start * dq_start, k_end * dk_end, dtotal, scores, like=a
            )
            ddecay_log = chunking.decay_cotangent(dg, decay_log, length, segments)
    dq, dk, dv = (chunking.from_chunks(x, length, segments) for x in (dq * scale, dk, flip(dvT)))
    return (
        chunking.sum_heads(dq, key_heads),
        chunking.sum_heads(dk, key_heads),
        dv,
        ddecay_log,
        flip(dinitial_state),
    )
