"""Gated linear attention by chunks, in plain JAX on every backend.

With S the state at the start of a chunk of C tokens, W_ij the product of the decays of tokens j+1..i, and prefix_i,
suffix_j, total its values over the chunk's start..i, j..end and the whole chunk (all <= 1, see `ops/chunking.py`):

    P_ij = sum_c q_ic k_jc W_ijc  (i >= j)        O  = (Q . prefix) S + P V
    S'   = Diag(total) S + (K . suffix)^T V

Only the last line is sequential over chunks, and elementwise. Backward, with dS' the gradient of the state at a chunk's
end:

    dS = Diag(total) dS' + (Q . prefix)^T dO      dP = dO V^T (i >= j)      dV = (K . suffix) dS' + P^T dO
    dQ = prefix . (dO S^T) + dP-weighted keys     dK = suffix . (V dS'^T) + dP-weighted queries

and the gradient of each log decay is the sum of factor times cotangent over the products that contain it. The backward
pass
recomputes the chunk states: only the inputs are kept. (Yang et al., Gated Linear Attention, arXiv 2312.06635, section
4; the exact products by halving instead of their secondary chunking.)
"""

import jax.numpy as jnp
from jax import lax

from .. import chunking
from ..chunking import einsum


def _cut(q, k, v, decay_log, scale, segment_ids):
    length, heads = v.shape[1:3]
    chunk = chunking.chunk_length(length, max(k.shape[-1], v.shape[-1]))
    q, k = (chunking.repeat_heads(x, heads) for x in (q, k))
    q, k, v = (chunking.to_chunks(x, chunk) for x in (q, k, v))
    a = chunking.decay_factors(decay_log, segment_ids, chunk, length)
    return q * scale, k, v, a


def _read_write(q, k, a):
    """Queries that read the chunk's first state, keys that write its last one, the decay across it [..., K or 1, 1]."""
    if a is None:
        return None, q, k, None
    tree = chunking.decay_tree(a)
    return tree, q * tree.prefix, k * tree.suffix, jnp.swapaxes(tree.total, -1, -2)


def _states(k_end, v, total, initial_state):
    """The state at the start of each chunk [G, B, H, K, V], and after the last."""
    written = einsum("...ck,...cv->...kv", k_end, v)

    def step(S, chunk):
        written, total = chunk
        return (S if total is None else total * S) + written, S

    final, S = lax.scan(step, initial_state.astype(jnp.float32), (written, total))
    return S, final


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale):
    """Shapes as in `api.py`; returns o in float32 and the final state."""
    length = v.shape[1]
    q, k, v, a = _cut(q, k, v, decay_log, scale, segment_ids)
    tree, q_start, k_end, total = _read_write(q, k, a)
    S, final_state = _states(k_end, v, total, initial_state)
    o = einsum("...ck,...kv->...cv", q_start, S) + einsum("...ij,...jv->...iv", chunking.decay_scores(q, k, tree), v)
    return chunking.from_chunks(o, length), final_state


def backward(q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale):
    """Cotangents of q, k, v, decay_log and initial_state, in float32."""
    length, key_heads = k.shape[1:3]
    q, k, v, a = _cut(q, k, v, decay_log, scale, segment_ids)
    do = chunking.to_chunks(do, q.shape[-2])
    tree, q_start, k_end, total = _read_write(q, k, a)
    S, _ = _states(k_end, v, total, initial_state)
    read = einsum("...ck,...cv->...kv", q_start, do)

    def step(dS, chunk):
        read, total = chunk
        return (dS if total is None else total * dS) + read, dS

    dinitial_state, dS = lax.scan(step, dfinal_state, (read, total), reverse=True)

    P = chunking.decay_scores(q, k, tree)
    dP = einsum("...iv,...jv->...ij", do, v)
    dq, dk, scores = chunking.decay_scores_gradient(dP, P, q, k, tree)
    dq_start, dk_end = einsum("...cv,...kv->...ck", do, S), einsum("...cv,...kv->...ck", v, dS)
    dv = einsum("...ck,...kv->...cv", k_end, dS) + einsum("...ij,...iv->...jv", P, do)
    ddecay_log = None
    if a is None or tree is None or total is None:
        dq, dk = dq + dq_start, dk + dk_end
    else:
        dq, dk = dq + dq_start * tree.prefix, dk + dk_end * tree.suffix
        if decay_log is not None:
            dtotal = jnp.swapaxes((total * S * dS).sum(-1, keepdims=True), -1, -2)
            dg = chunking.decay_log_gradient(q_start * dq_start, k_end * dk_end, dtotal, scores, like=a)
            ddecay_log = chunking.decay_cotangent(dg, decay_log, length)
    dq, dk, dv = (chunking.from_chunks(x, length) for x in (dq * scale, dk, dv))
    return chunking.sum_heads(dq, key_heads), chunking.sum_heads(dk, key_heads), dv, ddecay_log, dinitial_state
