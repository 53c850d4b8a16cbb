"""The (gated) delta rule on NVIDIA GPUs: chunks in order where states pass, all chunks at once
where they need not.

With S the state at the start of a chunk and the products of decays of `pallas_gpu_decay.py` (W_ij
of tokens j+1 .. i; r_i = scale prefix_i):

    P_ij = scale W_ij q_i.k_j  (i >= j)      A_ij = beta_i W_ij k_i.k_j  (i > j)      M = (I + A)^-1
    U = M (beta . V)                         X = M (beta . prefix . K)
    N = U - X S                              O = r (Q S) + P N                        S' = total S +
    K^T (suffix . N)

N are the corrected values that the chunk's tokens write (Yang et al., 2024, arXiv 2406.06484,
section 3, with decays). P, U and X do not depend on the state: a first kernel computes them for all
chunks at once, the inverse by substitution and merging (`pallas_gpu_inverse.py`). A second one
walks over the chunks; a program holds some value columns of the state of one head in registers.
With few heads these programs do not fill the chip; then time is cut into parts, each an affine map
of the state: the walk from zero gives what it adds, the walk from the identity without values its
matrix, the states at the starts of the parts follow from these, and the walk proper runs on all
parts at once.

Backward, with dS' the gradient of the state at a chunk's end:

    dN = P^T dO + suffix . (K dS')           dS = total dS' + Q^T (r dO) - X^T dN

The first kernel again, the walk that keeps S and N, a walk back that keeps dS' and dN (its parts
have the transposed matrices); then one kernel takes all chunks at once:

    D = M^T dN       dP = dO N^T       dA = -D N^T (i > j)       dV = beta . D       dK0 = -beta .
    (D S^T) dbeta = (D . V - (prefix . K) . (D S^T)) 1 + (dA . KK) 1,    KK_ij = W_ij k_i.k_j

and the rest follows as in gated linear attention, KK being one more product of keys and keys. dM
never appears: N solves N + A N = beta . (V - prefix . K S), so D is the gradient of the right side,
and dA that of A. Between forward and backward nothing is kept.

A decay per channel enters before: `channel_scores` writes P, KK, and the queries and keys with
their decays to memory. Of a long sequence all this is done piece by piece (`pallas_gpu_pieces.py`).

**Precision.** Float32 inputs enter matmuls in three terms of 8 bits. With bfloat16 inputs M is
float32 and enters in two, as does what it is multiplied with: with equal keys and beta near 2 its
rows alternate in sign, and what is left of their sums is less than the rounding of M to 8 bits. U,
X, N and dN are rounded to the dtype of matmuls, as states are where they enter one: equal keys
reflected at every token leave errors of 2 to 5 parts in a hundred in bfloat16, 1e-5 in float32.

Tile sizes and numbers of warps are chosen by the registers that the compiler reports, not by time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ...chunks.chunking import einsum, flip
from ...framework import segments
from ...gpu import pieces
from ...gpu import tiles as gpu
from ...gpu.chunks import Sizes, key_dtypes
from ...gpu.decay import channel_scores_adjoint
from .gradients import chunk_gradients
from .walks import Given, Writes, compute_writes, given_inputs, state_width, walk, walk_back

MAX_KEY = 256  # states of more key channels do not fit registers
SUPPORTED = f"float32 or bfloat16, K up to {MAX_KEY}"


def supports(q, k, v, beta, decay_log, initial_state, segment_ids, *_, scale) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del beta, decay_log, initial_state, segment_ids, scale
    return (
        gpu.available()
        and q.shape[-1] <= MAX_KEY
        and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in (q, k, v))
    )


def forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, interpret=False):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    rule = functools.partial(_forward, scale=scale, interpret=interpret)
    tokens = q, k, v, beta, decay_log
    return pieces.forward(rule, tokens, initial_state, segment_ids)


def _forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, interpret):
    """Of a piece of time."""
    sizes, given = given_inputs(q, k, v, beta, decay_log, segment_ids, scale, interpret)
    writes = compute_writes(sizes, given, keep_inverse=False)
    _, starts = _entering(sizes, given, writes, initial_state)
    walked = walk(sizes, given, writes, starts, read=True)
    return walked.o, walked.ends[:, -1]


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
    interpret=False,
):
    """Cotangents of q, k, v, beta, decay_log and initial_state."""
    return pieces.backward(
        functools.partial(_backward, scale=scale, interpret=interpret),
        functools.partial(_final_state, scale=scale, interpret=interpret),
        (q, k, v, beta, decay_log),
        initial_state,
        segment_ids,
        do,
        dfinal_state,
    )


def _final_state(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, interpret):
    sizes, given = given_inputs(q, k, v, beta, decay_log, segment_ids, scale, interpret)
    writes = compute_writes(sizes, given, keep_inverse=False)
    _, starts = _entering(sizes, given, writes, initial_state)
    return walk(sizes, given, writes, starts).ends[:, -1]


def _backward(
    q, k, v, beta, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, interpret
):
    """Of a piece of time."""
    sizes, given = given_inputs(q, k, v, beta, decay_log, segment_ids, scale, interpret)
    writes = compute_writes(sizes, given, keep_inverse=True)
    matrices, starts = _entering(sizes, given, writes, initial_state)
    states = walk(sizes, given, writes, starts, keep=True)
    starts = _part_starts(
        dfinal_state,
        matrices,
        lambda zeros: walk_back(sizes, given, writes, do, zeros, keep=False).ends,
        reverse=True,
    )
    dstates = walk_back(sizes, given, writes, do, starts, keep=True)
    made = chunk_gradients(sizes, given, writes, q, k, decay_log, do, states, dstates)
    dq, dk, dlog = made.dq, made.dk, made.dlog
    if made.by_channel is not None:
        dq, dk, dlog = channel_scores_adjoint(
            q,
            k,
            decay_log,
            segments.numbers(segment_ids),
            made.by_channel,
            scale,
            sizes.chunk,
            sizes.dtype,
            (*key_dtypes(q, k, sizes), decay_log.dtype),
            interpret=interpret,
        )
    dq, dk = (
        x.reshape(*q.shape[:3], -1, sizes.key).sum(3) if x.shape != q.shape else x for x in (dq, dk)
    )
    if decay_log is not None and decay_log.ndim == 1:
        dlog = dlog.sum((0, 2))
    return dq, dk, made.dv, made.dbeta, dlog, dstates.ends[:, 0]


# --- Parts of time
# --------------------------------------------------------------------------------------------------


def _parts(sizes: Sizes) -> int:
    tiles = gpu.divided(sizes.value, state_width(sizes))[1]
    return gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tiles)


def _entering(
    sizes: Sizes, given: Given, writes: Writes, initial_state: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """`_part_matrices`, and the states that enter the parts [B, parts, H, K, V]."""
    matrices = _part_matrices(sizes, given, writes, _parts(sizes))
    starts = _part_starts(
        initial_state, matrices, lambda zeros: walk(sizes, given, writes, zeros).ends, reverse=False
    )
    return matrices, starts


def _part_matrices(sizes: Sizes, given: Given, writes: Writes, parts: int) -> jax.Array | None:
    """[B, parts, H, K, K]: what a part makes of the state that enters it, without values."""
    if parts == 1:
        return None
    shape = sizes.batch, parts, sizes.heads, sizes.key, sizes.key
    identity = jnp.broadcast_to(jnp.eye(sizes.key, dtype=jnp.float32), shape)
    return walk(sizes, given, writes._replace(U=None), identity).ends


def _part_starts(
    entering: jax.Array, matrices: jax.Array | None, added: Any, reverse: bool
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V]; entering: the first (reverse: the last).

    added: a function from zero states like the result to those at the parts' ends, where there are
    several."""
    entering = entering.astype(jnp.float32)[:, None]
    if matrices is None:
        return entering
    zeros = jnp.zeros((*matrices.shape[:4], entering.shape[-1]), jnp.float32)

    def multiply(matrix: jax.Array, S: jax.Array) -> jax.Array:
        return einsum("bhkc,bhcv->bhkv", matrix, S)

    of_parts = flip(matrices) if reverse else matrices
    return gpu.part_starts(multiply, of_parts, added(zeros), entering, reverse)
