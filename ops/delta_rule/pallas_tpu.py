"""The (gated) delta rule on TPU: chunks in order, the state of a step's heads in fast memory.

With the products of `pallas_tpu_decay.py`, once of queries and keys (P, Q0 = q_start, K1 = k_end)
and once of keys and keys (KK strictly below the diagonal, K0 = q_start), and the state kept
transposed, Z = S^T [V, K]:

    M = (I + beta . KK)^-1             U = M (beta . V)           W = M (beta . K0)
    N = U - W Z^T                      O = Q0 Z^T + P N           Z' = Z . total + N^T K1

N are the corrected values that the chunk's tokens write (Yang et al., 2024, arXiv 2406.06484,
section 3, with decays). Backward runs over the chunks from last to first, with dZ' the gradient of
the state at a chunk's end:

    dN = P^T dO + K1 dZ'^T             D = M^T dN                 dV = beta . D
    dP = dO N^T                        dA = -D N^T (i > j)        dbeta = (D . (V - K0 Z^T)) 1 + (dA
    . KK) 1 dQ0 = dO Z                         dK0 = -(beta . D) Z        dK1 = N dZ'
    dtotal = sum_v Z . dZ'             dZ = dZ' . total + dO^T Q0 - dN^T W

dM never appears: N solves N + A N = beta . (V - K0 Z^T) with A = beta . KK, so D is the gradient of
the right side, and dA that of A. The products' adjoints take dP, dQ0, dK1 and dtotal to q, k and
log a, and dKK = beta . dA and dK0 to k (on both sides) and log a. The states at the starts of
chunks come from a first kernel; between forward and backward nothing is kept.

**Precision.** With equal keys and beta near 2 the state is reflected, not forgotten: the rows of M
alternate in sign, and what is left of their sums is smaller than the rounding of 128 terms to 8
bits. So what is multiplied by M or summed into a state keeps 16 bits (`Matmul.finer`), and M meets
V and K0 before it meets the state, whose large part cancels in V - K0 Z^T."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu import blocks as tpu
from ..tpu import gradients
from ..tpu.decay import Products, decay
from ..tpu.inverse import unit_lower_inverse

TUNING = tpu.Tuning()


def forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale, interpret=False):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    blocks = tpu.cut(q, v, TUNING)
    matmul = tpu.Matmul(tpu.matmul_dtype(q, k, v))
    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=False)
    state = blocks.states(blocks.key, blocks.value)
    o, final_state = tpu.call(
        functools.partial(_delta_forward, kind=kind, scale=scale),
        blocks,
        [*_tokens(blocks, (q, k), (v,), beta), *decays, (initial_state, state)],
        [(_like(tpu.flat(v), v.dtype), blocks.tokens(blocks.value)), (_like(initial_state), state)],
        [_states(blocks)],
        interpret=interpret,
    )
    return o.reshape(v.shape), final_state


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
    blocks = tpu.cut(q, v, TUNING)
    matmul = tpu.Matmul(tpu.matmul_dtype(q, k, v))
    state = blocks.states(blocks.key, blocks.value)
    transposed = blocks.value, blocks.key

    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=False)
    starts_shape = (blocks.batch, blocks.chunks, blocks.all_heads, *transposed)
    (starts,) = tpu.call(
        functools.partial(_delta_states, kind=kind),
        blocks,
        [*_tokens(blocks, (k,), (v,), beta), *decays, (initial_state, state)],
        [(jax.ShapeDtypeStruct(starts_shape, jnp.float32), blocks.chunk_states(*transposed))],
        [_states(blocks)],
        interpret=interpret,
    )

    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=True)
    inputs = [
        *_tokens(blocks, (q, k), (v, do), beta, reverse=True),
        (starts, blocks.chunk_states(*transposed, reverse=True)),
        *decays,
        (dfinal_state, state),
    ]
    dq, dk, dv, dbeta, dinitial_state, *dlog = tpu.call(
        functools.partial(_delta_backward, kind=kind, scale=scale, inputs=len(inputs)),
        blocks,
        inputs,
        [
            gradients.of_key_head(q, blocks),
            gradients.of_key_head(k, blocks),
            (_like(tpu.flat(v), v.dtype), blocks.tokens(blocks.value, reverse=True)),
            gradients.of_tokens(blocks),
            (_like(initial_state), state),
            *gradients.of_decay(decay_log, blocks),
        ],
        [_states(blocks)],
        interpret=interpret,
    )
    return (
        gradients.sum_of_parts(dq, q, blocks),
        gradients.sum_of_parts(dk, k, blocks),
        dv.reshape(v.shape),
        tpu.from_chunk_rows(dbeta, blocks.length).swapaxes(1, 2),
        gradients.decay_cotangent(dlog, decay_log, blocks.length),
        dinitial_state,
    )


def _tokens(blocks: tpu.Blocks, keys, values, beta, reverse: bool = False):
    """Kernel inputs: arrays like k, arrays like v, and beta as rows of chunks."""
    of_keys = blocks.tokens(blocks.key, key_heads=True, reverse=reverse)
    of_values = blocks.tokens(blocks.value, reverse=reverse)
    rows = tpu.chunk_rows(beta.swapaxes(1, 2), blocks)
    return [
        *((tpu.flat(x), of_keys) for x in keys),
        *((tpu.flat(x), of_values) for x in values),
        (rows, blocks.rows(rows, reverse)),
    ]


def _like(x: jax.Array, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)


def _states(blocks: tpu.Blocks) -> Any:
    return pltpu.VMEM((blocks.heads, blocks.value, blocks.key), jnp.float32)


def _decayed(Z: jax.Array, total: jax.Array | None) -> jax.Array:
    return Z if total is None else Z * total


class _Writes(NamedTuple):
    """What a chunk writes, as a function of the state: N = U - W Z^T. overlaps: products of keys
    and keys."""

    overlaps: Products
    KK: jax.Array
    M: jax.Array
    U: jax.Array
    W: jax.Array


def _writes(chunk_decay, h, k, v, beta):
    """Of k [C, K], v [C, V] and beta [C, 1] of head h."""
    fine = chunk_decay.matmul.finer
    overlaps = yield from chunk_decay.products(h, k, k)
    row, column = tpu.indices(*overlaps.scores.shape)
    KK = overlaps.scores * (row > column).astype(jnp.float32)
    M = yield from unit_lower_inverse(fine, beta * KK)
    yield
    U, W = fine.nn(M, beta * v), fine.nn(M, beta * overlaps.q_start)
    yield
    return _Writes(overlaps, KK, M, U, W)


def _load_states(states_ref, initial_ref, blocks):
    """From [K, V] at the first chunk that the kernel takes."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for h in range(blocks.heads):
            states_ref[h] = initial_ref[0, h].astype(jnp.float32).T


def _store_states(final_ref, states_ref, blocks):
    """To [K, V] at the last chunk that the kernel takes."""

    @pl.when(pl.program_id(2) == blocks.chunks - 1)
    def _():
        for h in range(blocks.heads):
            final_ref[0, h] = states_ref[h].T


def _delta_forward(q_ref, k_ref, v_ref, beta_ref, *refs, kind, scale):
    *decay_refs, initial_ref, o_ref, final_ref, Z_ref = refs
    blocks, matmul, t = kind.blocks, kind.matmul, pl.program_id(2)
    fine = matmul.finer
    K, V = blocks.key, blocks.value
    _load_states(Z_ref, initial_ref, blocks)
    valid = tpu.valid_rows(blocks, t)
    chunk_decay, betas = kind.load(decay_refs, t), beta_ref[0, 0, 0].T

    def head(h):
        q, k = (tpu.read(ref, h // blocks.group, K, valid) for ref in (q_ref, k_ref))
        v = tpu.read(v_ref, h, V, valid).astype(jnp.float32)
        beta = betas[:, h : h + 1]
        _, _, _, U, W = yield from _writes(chunk_decay, h, k, v, beta)
        chunk = yield from chunk_decay.products(h, q, k)
        Z = Z_ref[h]
        N, o_state = U - fine.nt(W, Z), matmul.nt(chunk.q_start, Z)
        yield
        o_chunk, written = fine.nn(chunk.scores, N), fine.tn(N, chunk.k_end)
        yield
        Z_ref[h] = _decayed(Z, chunk.total) + written
        o_ref[0, :, h * V : (h + 1) * V] = (scale * (o_state + o_chunk)).astype(o_ref.dtype)

    tpu.interleave(head(h) for h in range(blocks.heads))
    _store_states(final_ref, Z_ref, blocks)


def _delta_states(k_ref, v_ref, beta_ref, *refs, kind):
    *decay_refs, initial_ref, starts_ref, Z_ref = refs
    blocks, fine, t = kind.blocks, kind.matmul.finer, pl.program_id(2)
    _load_states(Z_ref, initial_ref, blocks)
    valid = tpu.valid_rows(blocks, t)
    chunk_decay, betas = kind.load(decay_refs, t), beta_ref[0, 0, 0].T

    def head(h):
        k = tpu.read(k_ref, h // blocks.group, blocks.key, valid)
        v = tpu.read(v_ref, h, blocks.value, valid).astype(jnp.float32)
        beta = betas[:, h : h + 1]
        overlaps, _, _, U, W = yield from _writes(chunk_decay, h, k, v, beta)
        Z = Z_ref[h]
        starts_ref[0, 0, h] = Z
        N = U - fine.nt(W, Z)
        yield
        written = fine.tn(N, overlaps.k_end)
        yield
        Z_ref[h] = _decayed(Z, overlaps.total) + written

    tpu.interleave(head(h) for h in range(blocks.heads))


def _delta_backward(*refs, kind, scale, inputs):
    inputs, outputs = refs[:inputs], refs[inputs:]
    q_ref, k_ref, v_ref, do_ref, beta_ref, starts_ref, *decay_refs, dfinal_ref = inputs
    dq_ref, dk_ref, dv_ref, dbeta_ref, dinitial_ref, *dlog_refs, dZ_ref = outputs
    blocks, matmul, t = kind.blocks, kind.matmul, pl.program_id(2)
    fine = matmul.finer
    K, V = blocks.key, blocks.value
    _load_states(dZ_ref, dfinal_ref, blocks)
    chunk_index = blocks.chunks - 1 - t
    valid = tpu.valid_rows(blocks, chunk_index)
    chunk_decay, betas = kind.load(decay_refs, chunk_index), beta_ref[0, 0, 0].T
    row, column = tpu.indices(blocks.chunk, blocks.chunk)
    dqs, dks = {}, {}  # sums over the value heads of a key head

    def head(h):
        q, k = (tpu.read(ref, h // blocks.group, K, valid) for ref in (q_ref, k_ref))
        v = tpu.read(v_ref, h, V, valid).astype(jnp.float32)
        beta = betas[:, h : h + 1]
        do = scale * tpu.read(do_ref, h, V, valid).astype(jnp.float32)
        Z, dZ = starts_ref[0, 0, h], dZ_ref[h]
        overlaps, KK, M, U, W = yield from _writes(chunk_decay, h, k, v, beta)
        chunk = yield from chunk_decay.products(h, q, k)
        N, missing = U - fine.nt(W, Z), v - fine.nt(overlaps.q_start, Z)
        dN = fine.tn(chunk.scores, do) + fine.nt(chunk.k_end, dZ)
        yield
        D = fine.tn(M, dN)
        yield
        dscores, dA = fine.nt(do, N), -fine.nt(D, N)
        dv = beta * D
        dq_start, dk_start = matmul.nn(do, Z), -matmul.nn(dv, Z)
        dk_end = matmul.nn(N, dZ)
        read = matmul.tn(do, chunk.q_start) - fine.tn(dN, W)
        dtotal = jnp.sum(Z * dZ, 0, keepdims=True)
        yield
        dA *= (row > column).astype(jnp.float32)
        dbeta = jnp.sum(D * missing, 1, keepdims=True)
        dbeta += jnp.sum(dA * KK, 1, keepdims=True)
        dbeta_ref[0, 0, 0, h : h + 1] = jnp.sum(
            jnp.where(row == column, dbeta, 0.0), 0, keepdims=True
        )
        dv_ref[0, :, h * V : (h + 1) * V] = dv.astype(dv_ref.dtype)
        dZ_ref[h] = _decayed(dZ, chunk.total) + read
        of_reads = yield from chunk_decay.adjoint(h, chunk, q, k, dscores, dq_start, dk_end, dtotal)
        counted = jnp.zeros_like(dk_end), jnp.zeros_like(dtotal)  # by the adjoint above
        of_overlaps = yield from chunk_decay.adjoint(
            h, overlaps, k, k, beta * dA, dk_start, *counted
        )
        if dlog_refs:
            gradients.store_decay(dlog_refs, h, of_reads.log + of_overlaps.log)
        at, last = h // blocks.group, h % blocks.group == blocks.group - 1
        for ref, sums, gradient in (
            (dq_ref, dqs, of_reads.q),
            (dk_ref, dks, of_reads.k + of_overlaps.q + of_overlaps.k),
        ):
            sums[at] = sums[at] + gradient if at in sums else gradient
            if last:
                ref[0, :, at * K : (at + 1) * K] = sums[at].astype(ref.dtype)

    tpu.interleave(head(h) for h in range(blocks.heads))
    _store_states(dinitial_ref, dZ_ref, blocks)
