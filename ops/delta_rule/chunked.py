"""The (gated) delta rule by chunks, in plain JAX on every backend.

With S the state at the start of a chunk and the interval products of `ops/chunking.py` (W_ij of tokens j+1..i; all <=
1):

    Q0 = Q . prefix    K0 = K . prefix    K1 = K . suffix
    P_ij = sum_c q_ic k_jc W_ijc (i >= j)           A_ij = beta_i sum_c k_ic k_jc W_ijc (i > j)
    N  = (I + A)^-1 (beta . (V - K0 S))             the corrected values that the chunk's tokens write
    O  = Q0 S + P N                                 S' = Diag(total) S + K1^T N

The inverse does not depend on S, so M = (I + A)^-1, M (beta . V) and M (beta . K0) are made for all chunks at once and
only two products per chunk are sequential. M is computed by forward substitution in diagonal blocks and merging of
blocks, never by
squaring A: with identical keys the powers of A overflow float32 while M itself stays below 2.

Backward, with dS' the gradient of the state at a chunk's end; D is the gradient of beta . (V - K0 S):

    D  = M^T (P^T dO + K1 dS')                      dS = Diag(total) dS' + Q0^T dO - K0^T (beta . D)
    dP = dO N^T (i >= j)    dA = -D N^T (i > j)     dV = beta . D

and the rest follows from the definitions of P, A, Q0, K0, K1. Only the inputs are kept. (Yang et al., Parallelizing
Linear Transformers with the Delta Rule, arXiv 2406.06484, section 3; with decay: Gated Delta Networks, arXiv
2412.06464.)
"""

import jax
import jax.numpy as jnp
from jax import lax

from .. import chunking
from ..chunking import einsum

SUBSTITUTION = 8  # rows solved one after another; larger blocks are merged by products


def unit_lower_inverse(A: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower-triangular A [..., C, C], C a power of two."""
    *_, chunk, _ = A.shape
    rows = min(SUBSTITUTION, chunk)
    diagonal = jnp.stack([A[..., i : i + rows, i : i + rows] for i in range(0, chunk, rows)], axis=-3)
    eye = jnp.broadcast_to(jnp.eye(rows, dtype=A.dtype).reshape((1,) * (A.ndim - 1) + (rows, rows)), diagonal.shape)
    solved = eye[..., :1, :]
    for r in range(1, rows):
        known = jnp.sum(diagonal[..., r, :r, None] * solved, axis=-2, keepdims=True)
        solved = jnp.concatenate([solved, eye[..., r : r + 1, :] - known], axis=-2)
    for below in chunking.below_blocks(A)[rows.bit_length() - 1 :]:
        first, second = chunking.halves(solved)
        solved = chunking.join(
            solved, -einsum("...ij,...jl->...il", second, einsum("...ij,...jl->...il", below, first))
        )
    return solved[..., 0, :, :]


def _cut(q, k, v, beta, decay_log, scale, segment_ids):
    length, heads = v.shape[1:3]
    chunk = chunking.chunk_length(length, max(k.shape[-1], v.shape[-1]))
    q, k = (chunking.repeat_heads(x, heads) for x in (q, k))
    q, k, v, beta = (chunking.to_chunks(x, chunk) for x in (q, k, v, beta[..., None]))
    a = chunking.decay_factors(decay_log, segment_ids, chunk, length)
    return q * scale, k, v, beta, a


def _chunk_quantities(q, k, beta, a):
    """Everything that does not depend on the state; total is [..., K or 1, 1] or None."""
    tree = None if a is None else chunking.decay_tree(a)
    if tree is None:
        q0, k0, k1, total = q, k, k, None
    else:
        q0, k0, k1 = q * tree.prefix, k * tree.prefix, k * tree.suffix
        total = jnp.swapaxes(tree.total, -1, -2)
    KK = chunking.lower(chunking.decay_scores(k, k, tree), strict=True)
    return tree, q0, k0, k1, total, KK, unit_lower_inverse(beta * KK)


def _states(M, k0, k1, v, beta, total, initial_state):
    """States at chunk starts [G, B, H, K, V], corrected values N [G, B, H, C, V], state after the last chunk."""
    values, keys = einsum("...ij,...jv->...iv", M, beta * v), einsum("...ij,...jk->...ik", M, beta * k0)

    def step(S, chunk):
        values, keys, k1, total = chunk
        N = values - einsum("...ck,...kv->...cv", keys, S)
        return (S if total is None else total * S) + einsum("...ck,...cv->...kv", k1, N), (S, N)

    final, (S, N) = lax.scan(step, initial_state.astype(jnp.float32), (values, keys, k1, total))
    return S, N, final


def forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale):
    """Shapes as in `api.py`; returns o in float32 and the final state."""
    length = v.shape[1]
    q, k, v, beta, a = _cut(q, k, v, beta, decay_log, scale, segment_ids)
    tree, q0, k0, k1, total, _, M = _chunk_quantities(q, k, beta, a)
    S, N, final_state = _states(M, k0, k1, v, beta, total, initial_state)
    o = einsum("...ck,...kv->...cv", q0, S) + einsum("...ij,...jv->...iv", chunking.decay_scores(q, k, tree), N)
    return chunking.from_chunks(o, length), final_state


def backward(q, k, v, beta, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale):
    """Cotangents of q, k, v, beta, decay_log and initial_state, in float32."""
    length, key_heads = k.shape[1:3]
    q, k, v, beta, a = _cut(q, k, v, beta, decay_log, scale, segment_ids)
    do = chunking.to_chunks(do, q.shape[-2])
    tree, q0, k0, k1, total, KK, M = _chunk_quantities(q, k, beta, a)
    S, N, _ = _states(M, k0, k1, v, beta, total, initial_state)
    P = chunking.decay_scores(q, k, tree)

    D_inner = einsum("...ij,...iv->...jv", M, einsum("...ij,...iv->...jv", P, do))
    k1_M = einsum("...ij,...ik->...jk", M, k1)
    read = einsum("...ck,...cv->...kv", q0, do)

    def step(dS, chunk):
        D_inner, k1_M, k0_beta, read, total = chunk
        D = D_inner + einsum("...ck,...kv->...cv", k1_M, dS)
        before = (dS if total is None else total * dS) + read - einsum("...ck,...cv->...kv", k0_beta, D)
        return before, (D, dS)

    dinitial_state, (D, dS) = lax.scan(step, dfinal_state, (D_inner, k1_M, beta * k0, read, total), reverse=True)

    dA = -chunking.lower(einsum("...iv,...jv->...ij", D, N), strict=True)
    dP = einsum("...iv,...jv->...ij", do, N)
    dq, dk_P, scores_P = chunking.decay_scores_gradient(dP, P, q, k, tree)
    dk_row, dk_column, scores_KK = chunking.decay_scores_gradient(beta * dA, KK, k, k, tree)
    dq0 = einsum("...cv,...kv->...ck", do, S)
    dk0 = -beta * einsum("...cv,...kv->...ck", D, S)
    dk1 = einsum("...cv,...kv->...ck", N, dS)
    dk = dk_P + dk_row + dk_column
    dv = beta * D
    corrected = v - einsum("...ck,...kv->...cv", k0, S)
    dbeta = (D * corrected).sum(-1, keepdims=True) + (dA * KK).sum(-1, keepdims=True)

    ddecay_log = None
    if a is None or tree is None or total is None:
        dq, dk = dq + dq0, dk + dk0 + dk1
    else:
        dq, dk = dq + dq0 * tree.prefix, dk + dk0 * tree.prefix + dk1 * tree.suffix
        if decay_log is not None:
            dtotal = jnp.swapaxes((total * S * dS).sum(-1, keepdims=True), -1, -2)
            dg = chunking.decay_log_gradient(q0 * dq0 + k0 * dk0, k1 * dk1, dtotal, scores_P, scores_KK, like=a)
            ddecay_log = chunking.decay_cotangent(dg, decay_log, length)
    dq, dk, dv, dbeta = (chunking.from_chunks(x, length) for x in (dq * scale, dk, dv, dbeta))
    dq, dk = (chunking.sum_heads(x, key_heads) for x in (dq, dk))
    return dq, dk, dv, dbeta[..., 0], ddecay_log, dinitial_state
