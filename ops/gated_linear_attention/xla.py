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
from ..chunks.chunking import einsum, flip
from ..chunks.segment_states import chunk_owners, scan_segments


def _cut(q, k, v, decay_log, scale, segment_ids, num_segments):
    """q, k, v [G, B, H, C, K or V], q scaled, the decays a of tokens, and the cut by segments."""
    length, heads = v.shape[1:3]
    size = max(k.shape[-1], v.shape[-1])
    chunk, segment_ids, segments = chunking.cut(length, size, segment_ids, num_segments)
    q, k = (chunking.repeat_heads(x, heads) for x in (q, k))
    q, k, v = (chunking.to_chunks(x, chunk, segments=segments) for x in (q, k, v))
    a = chunking.decay_factors(decay_log, segment_ids, chunk, length, segments)
    return q * scale, k, v, a, segments


def _read_write(q, k, a):
    """The decay tree, Q . prefix and K . suffix [..., C, K], and total [..., 1, K or 1]."""
    if a is None:
        return None, q, k, None
    tree = chunking.decay_tree(a)
    return tree, q * tree.prefix, k * tree.suffix, tree.total


def _states(k_end, vT, total, initial_state, segments):
    """The state at the start of each chunk [G, B, H, V, K], and after the last [B, H, K, V] or, of
    each segment, [B, S, H, K, V]."""
    written = einsum("...vc,...ck->...vk", vT, k_end)

    def step(S, chunk):
        written, total = chunk
        return (S if total is None else total * S) + written, S  # Eq. 3

    final, S = scan_segments(step, flip(initial_state), (written, total), chunk_owners(segments))
    return S, flip(final)


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, num_segments=None):
    """o in float32 and the final state; shapes as in `api.py`."""
    length = v.shape[1]
    q, k, v, a, segments = _cut(q, k, v, decay_log, scale, segment_ids, num_segments)
    tree, q_start, k_end, total = _read_write(q, k, a)
    S, final_state = _states(k_end, flip(v), total, initial_state, segments)
    P = chunking.decay_scores(q, k, tree)  # Eq. 1
    # Eq. 2
    oT = einsum("...vk,...ck->...vc", S, q_start) + einsum("...vj,...ij->...vi", flip(v), P)
    return chunking.from_chunks(flip(oT), length, segments), final_state


def backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, num_segments=None
):
    """Gradients of q, k, v, decay_log and initial_state, in float32."""
    length, key_heads = k.shape[1:3]
    q, k, v, a, segments = _cut(q, k, v, decay_log, scale, segment_ids, num_segments)
    do = chunking.to_chunks(do, q.shape[-2], segments=segments)
    tree, q_start, k_end, total = _read_write(q, k, a)
    vT, doT = flip(v), flip(do)
    S, _ = _states(k_end, vT, total, initial_state, segments)
    read = einsum("...vc,...ck->...vk", doT, q_start)

    def step(dS, chunk):
        read, total = chunk
        return (dS if total is None else total * dS) + read, dS  # Eq. 4

    dinitial_state, dS = scan_segments(
        step, flip(dfinal_state), (read, total), chunk_owners(segments), reverse=True
    )

    P = chunking.decay_scores(q, k, tree)
    dP = einsum("...iv,...vj->...ij", do, vT)  # Eq. 5
    dq, dk, scores = chunking.decay_scores_gradient(dP, P, q, k, tree)
    dq_start, dk_end = (einsum("...cv,...vk->...ck", do, S), einsum("...cv,...vk->...ck", v, dS))
    # Eq. 6
    dvT = einsum("...vk,...ck->...vc", dS, k_end) + einsum("...vi,...ij->...vj", doT, P)
    ddecay_log = None
    if a is None or tree is None:
        dq, dk = dq + dq_start, dk + dk_end
    else:
        dq, dk = dq + dq_start * tree.prefix, dk + dk_end * tree.suffix  # Eq. 7 and 8
        if decay_log is not None:
            dtotal = (total * S * dS).sum(-2, keepdims=True)
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
