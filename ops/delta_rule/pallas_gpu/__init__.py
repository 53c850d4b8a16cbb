"""The (gated) delta rule on NVIDIA GPUs: chunks in order where states pass, all chunks at once
where they need not. (`ops/gpu/__init__.py` explains the words.)

With the products of decays of `ops/gpu/decay.py`, S the state at the start of a chunk and S' the
state at its end:

    P_ij = W_ij q_i.k_j  (i >= j)       KK_ij = W_ij k_i.k_j  (i > j)                 (1)
    A = beta . KK                       M = (I + A)^-1                                (2)
    U = M (beta . V)                                                                  (3)
    X = M (beta . prefix . K)                                                         (4)
    N = U - X S                                                                       (5)
    O = scale (prefix . (Q S) + P N)                                                  (6)
    S' = total S + K^T (suffix . N)                                                   (7)

N are the corrected values that the chunk's tokens write (Yang et al., 2024, arXiv 2406.06484,
section 3, with decays). P, U and X do not depend on the state: a first kernel computes them for all
chunks at once, the inverse by substitution and merging (`ops/gpu/inverse.py`). A second kernel
walks over the chunks; a program holds some value channels of the state of one head in registers.
With few heads these programs do not fill a GPU, and time is cut into parts. A part is an affine map
of the state: the walk from zero gives what it adds, the walk from the identity without values gives
its matrix.

Backward, with dS' the gradient of the state at a chunk's end:

    dN = suffix . (K dS') + scale P^T dO                                              (8)
    dS = total dS' + scale Q^T (prefix . dO) - X^T dN                                 (9)

The first kernel again, the walk that keeps S and N, a walk back that keeps dS' and dN (its parts
have the transposed matrices); then one kernel takes all chunks at once:

    D = M^T dN                                                                        (10)
    dP = scale dO N^T                   dA = -D N^T  (i > j)                          (11)
    dV = beta . D                                                                     (12)
    dKK = beta . dA                                                                   (13)
    dbeta = sum over channels of D . V - (prefix . K) . (D S^T), plus row sums of dA . KK
    dQ = scale prefix . (dO S^T) + (W . dP) K                                         (14)
    dK = -beta . prefix . (D S^T) + suffix . (N dS'^T)
         + (W . dP)^T Q + (W . dKK + (W . dKK)^T) K                                   (15)

and the gradient of the logs is Eq. 4 of `decay.py` with W dW = P . dP + KK . dKK and the first
terms of Eq. 14 and 15, as in gated linear attention. The gradient of M is not needed: N solves
N + A N = beta . (V - prefix . K S), so D is the gradient of the right side, and dA that of A.
Between forward and backward nothing is kept.

A decay for each channel is applied before (`ops/gpu/channel_decay.py`): the kernels here read P,
KK, and the queries and keys with their decays from memory. Long sequences run piece by piece
(`ops/gpu/pieces.py`).

**Precision.** Float32 inputs enter matmuls in three terms of 8 bits. With bfloat16 inputs M is
float32 and enters in two terms, and so does what it is multiplied with: with equal keys and beta
near 2 its rows alternate in sign, and their sums are smaller than the rounding of M to 8 bits. U,
X, N and dN are rounded to the dtype of matmuls, as states are where they enter one: equal keys
reflected at every token leave errors of 2 to 5 parts in a hundred in bfloat16, 1e-5 in float32.

Tile sizes and numbers of warps are chosen by the registers that the compiler reports, not by time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ...chunks.chunking import einsum, flip
from ...gpu import pieces
from ...gpu import tiles as gpu
from ...gpu.channel_decay import chunk_inputs
from ...gpu.chunks import Sizes
from ...gpu.gradients import gradient_shapes, input_gradients
from .gradients import GradientInputs, chunk_gradients
from .walks import KernelInputs, WalkInputs, Writes, compute_writes, walk, walk_back

WALKS_BACKWARDS = True  # the rules take `reverse`
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


def forward(
    q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, reverse=False, interpret=False
):
    """o [B, T, H, V] in v's dtype and the final state in float32; shapes as in `api.py`."""
    rule = functools.partial(_forward, scale=scale, reverse=reverse, interpret=interpret)
    tokens = q, k, v, beta, decay_log
    return pieces.forward(rule, tokens, initial_state, segment_ids, reverse)


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
    reverse=False,
    interpret=False,
):
    """Gradients of q, k, v, beta, decay_log and initial_state."""
    return pieces.backward(
        functools.partial(_backward, scale=scale, reverse=reverse, interpret=interpret),
        functools.partial(_final_state, scale=scale, reverse=reverse, interpret=interpret),
        (q, k, v, beta, decay_log),
        initial_state,
        segment_ids,
        do,
        dfinal_state,
        reverse,
    )


# --- One piece of time


def _forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, reverse, interpret):
    sizes, inputs = _inputs(q, k, v, beta, decay_log, segment_ids, scale, reverse, interpret)
    writes = compute_writes(sizes, inputs, keep_inverse=False)
    _, starts = _states_at_parts(sizes, inputs, writes, initial_state)
    shape = sizes.tokens_shape(v)
    walked = walk(sizes, WalkInputs(inputs.chunks, writes, None, starts), o=shape)
    return walked.o, walked.ends[:, -1]


def _final_state(
    q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, reverse, interpret
):
    sizes, inputs = _inputs(q, k, v, beta, decay_log, segment_ids, scale, reverse, interpret)
    writes = compute_writes(sizes, inputs, keep_inverse=False)
    _, starts = _states_at_parts(sizes, inputs, writes, initial_state)
    return walk(sizes, WalkInputs(inputs.chunks, writes, None, starts)).ends[:, -1]


def _backward(
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
    reverse,
    interpret,
):
    sizes, inputs = _inputs(q, k, v, beta, decay_log, segment_ids, scale, reverse, interpret)
    writes = compute_writes(sizes, inputs, keep_inverse=True)
    matrices, starts = _states_at_parts(sizes, inputs, writes, initial_state)
    states = walk(sizes, WalkInputs(inputs.chunks, writes, None, starts), keep=True)

    def increments(zeros: jax.Array) -> jax.Array:
        return walk_back(sizes, WalkInputs(inputs.chunks, writes, do, zeros)).ends

    starts = _part_starts(dfinal_state, matrices, increments, reverse=True)
    dstates = walk_back(sizes, WalkInputs(inputs.chunks, writes, do, starts), keep=True)
    shapes = gradient_shapes(sizes, inputs.chunks, q, k, v, decay_log, beta, key_scores=True)
    gradients = chunk_gradients(sizes, GradientInputs(inputs, writes, do, states, dstates), shapes)
    dq, dk, dlog = input_gradients(sizes, gradients, q, k, decay_log, segment_ids, scale)
    return dq, dk, gradients.dv, gradients.dbeta, dlog, dstates.ends[:, 0]


def _chunk_length(length: int, key: int) -> int:
    """C: 64, or less for shorter sequences and where states of many key channels take the
    registers."""
    return min(64 if key <= 128 else 32, gpu.tile_size(length))


def _inputs(
    q, k, v, beta, decay_log, segment_ids, scale, reverse, interpret
) -> tuple[Sizes, KernelInputs]:
    sizes = Sizes(
        *v.shape[:3],
        key=q.shape[-1],
        value=v.shape[-1],
        chunk=_chunk_length(v.shape[1], q.shape[-1]),
        dtype=gpu.matmul_dtype(q, k, v),
        scale=scale,
        reverse=reverse,
        interpret=interpret,
    )
    sizes, chunks, channels = chunk_inputs(sizes, q, k, decay_log, segment_ids, key_scores=True)
    if channels is None:
        return sizes, KernelInputs(chunks, v, beta)
    return sizes, KernelInputs(chunks, v, beta, channels.key_scores, channels.k_start)


# --- Parts of time


def _states_at_parts(
    sizes: Sizes, inputs: KernelInputs, writes: Writes, initial_state: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """The matrices of the parts [B, parts, H, K, K] (None where there is one part), and the states
    that enter the parts [B, parts, H, K, V]."""
    _, tile_count = gpu.tiling(sizes.value, sizes.state_width)
    parts = gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tile_count)
    matrices = None
    if parts > 1:
        # What becomes of the identity without values.
        shape = sizes.batch, parts, sizes.heads, sizes.key, sizes.key
        identity = jnp.broadcast_to(jnp.eye(sizes.key, dtype=jnp.float32), shape)
        no_values = writes._replace(U=None)
        matrices = walk(sizes, WalkInputs(inputs.chunks, no_values, None, identity)).ends

    def increments(zeros: jax.Array) -> jax.Array:
        return walk(sizes, WalkInputs(inputs.chunks, writes, None, zeros)).ends

    return matrices, _part_starts(initial_state, matrices, increments, reverse=False)


def _part_starts(
    initial_state: jax.Array,
    matrices: jax.Array | None,
    increments: Callable[[jax.Array], jax.Array],
    reverse: bool,
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V]; initial_state [B, H, K, V] enters the
    first, or in reverse the last.

    increments: maps zero states that enter the parts to the states that leave them."""
    initial_state = initial_state.astype(jnp.float32)[:, None]
    if matrices is None:
        return initial_state
    zeros = jnp.zeros((*matrices.shape[:4], initial_state.shape[-1]), jnp.float32)

    def multiply(matrix: jax.Array, S: jax.Array) -> jax.Array:
        return einsum("bhkc,bhcv->bhkv", matrix, S)

    factors = flip(matrices) if reverse else matrices
    return gpu.part_starts(multiply, factors, increments(zeros), initial_state, reverse)
