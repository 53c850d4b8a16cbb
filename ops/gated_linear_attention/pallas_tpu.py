"""Gated linear attention on TPU: chunks in order, the state of a step's heads in fast memory.

With the products of `pallas_tpu_decay.py` (P: scores with their decays, q_start: queries that read
the state at the chunk's start, k_end: keys that write the one at its end) and the state kept
transposed, Z = S^T [V, K], so that its decay is a row:

    O = q_start Z^T + P V          Z' = Z . total + V^T k_end

Backward runs over the chunks from last to first, with dZ' the gradient of the state at a chunk's
end:

    dQ_start = dO Z      dK_end = V dZ'      dP = dO V^T      dV = k_end dZ'^T + P^T dO
    dtotal = sum_v Z . dZ'                   dZ = dZ' . total + dO^T q_start

and needs the states at the starts of the chunks, which a first kernel recomputes from the inputs:
between forward and backward nothing is kept, and the states make one round trip through memory, K V
float32 values per C tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu import blocks as tpu
from ..tpu import gradients
from ..tpu.decay import decay

TUNING = tpu.Tuning()


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, interpret=False):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    blocks = tpu.cut(q, v, TUNING)
    matmul = tpu.Matmul(tpu.matmul_dtype(q, k, v))
    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=False)
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    of_keys, of_values = blocks.tokens(key, key_heads=True), blocks.tokens(value)
    state = blocks.states(key, value)
    o, final_state = tpu.call(
        functools.partial(_gla_forward, kind=kind, scale=scale),
        blocks,
        [
            (tpu.flat(q), of_keys),
            (tpu.flat(k), of_keys),
            (tpu.flat(v), of_values),
            *decays,
            (initial_state, state),
        ],
        [
            (jax.ShapeDtypeStruct((batch, length, heads * value), v.dtype), of_values),
            (jax.ShapeDtypeStruct((batch, heads, key, value), jnp.float32), state),
        ],
        [_states(blocks)],
        interpret=interpret,
    )
    return o.reshape(v.shape), final_state


def backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, interpret=False
):
    """Cotangents of q, k, v, decay_log and initial_state."""
    blocks = tpu.cut(q, v, TUNING)
    matmul = tpu.Matmul(tpu.matmul_dtype(q, k, v))
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    qf, kf, vf, dof = (tpu.flat(x) for x in (q, k, v, do))
    state = blocks.states(key, value)

    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=False)
    (starts,) = tpu.call(
        functools.partial(_gla_states, kind=kind),
        blocks,
        [
            (kf, blocks.tokens(key, key_heads=True)),
            (vf, blocks.tokens(value)),
            *decays,
            (initial_state, state),
        ],
        [
            (
                jax.ShapeDtypeStruct((batch, blocks.chunks, heads, value, key), jnp.float32),
                blocks.chunk_states(value, key),
            )
        ],
        [_states(blocks)],
        interpret=interpret,
    )

    kind, decays = decay(matmul, blocks, decay_log, segment_ids, reverse=True)
    of_keys = blocks.tokens(key, key_heads=True, reverse=True)
    of_values = blocks.tokens(value, reverse=True)
    dq, dk, dv, dinitial_state, *dlog = tpu.call(
        functools.partial(_gla_backward, kind=kind, scale=scale, inputs=len(decays) + 6),
        blocks,
        # What is loaded least comes first: short of scalar registers, the compiler moves the first
        # inputs' addresses to memory, and libtpu 0.0.42.1 lets every load through such an address
        # wait for the stores before it.
        [
            (vf, of_values),
            (dof, of_values),
            (qf, of_keys),
            (kf, of_keys),
            (starts, blocks.chunk_states(value, key, reverse=True)),
            *decays,
            (dfinal_state, state),
        ],
        [
            gradients.of_key_head(q, blocks),
            gradients.of_key_head(k, blocks),
            (jax.ShapeDtypeStruct(vf.shape, v.dtype), of_values),
            (jax.ShapeDtypeStruct((batch, heads, key, value), jnp.float32), state),
            *gradients.of_decay(decay_log, blocks),
        ],
        [_states(blocks)],
        interpret=interpret,
    )
    return (
        gradients.sum_of_parts(dq, q, blocks),
        gradients.sum_of_parts(dk, k, blocks),
        dv.reshape(v.shape),
        gradients.decay_cotangent(dlog, decay_log, length),
        dinitial_state,
    )


def _states(blocks: tpu.Blocks) -> Any:
    return pltpu.VMEM((blocks.heads, blocks.value, blocks.key), jnp.float32)


def _decayed(Z: jax.Array, total: jax.Array | None) -> jax.Array:
    return Z if total is None else Z * total


def _gla_forward(q_ref, k_ref, v_ref, *refs, kind, scale):
    *decay_refs, initial_ref, o_ref, final_ref, Z_ref = refs
    blocks, matmul, t = kind.blocks, kind.matmul, pl.program_id(2)
    K, V = blocks.key, blocks.value

    @pl.when(t == 0)
    def _():
        for h in range(blocks.heads):
            Z_ref[h] = initial_ref[0, h].astype(jnp.float32).T

    valid = tpu.valid_rows(blocks, t)
    chunk_decay = kind.load(decay_refs, t)

    def head(h):
        q, k = (tpu.read(ref, h // blocks.group, K, valid) for ref in (q_ref, k_ref))
        v = tpu.read(v_ref, h, V, valid)
        chunk = yield from chunk_decay.products(h, q, k)
        Z = Z_ref[h]
        o_state = matmul.nt(chunk.q_start, Z)
        written = chunk_decay.write(matmul, h, v, k, chunk.k_end)
        yield
        o_chunk = matmul.nn(chunk.scores, v)
        Z_ref[h] = _decayed(Z, chunk.total) + written
        yield
        o_ref[0, :, h * V : (h + 1) * V] = (scale * (o_state + o_chunk)).astype(o_ref.dtype)

    tpu.interleave(head(h) for h in range(blocks.heads))

    @pl.when(t == blocks.chunks - 1)
    def _():
        for h in range(blocks.heads):
            final_ref[0, h] = Z_ref[h].T


def _gla_states(k_ref, v_ref, *refs, kind):
    *decay_refs, initial_ref, starts_ref, Z_ref = refs
    blocks, matmul, t = kind.blocks, kind.matmul, pl.program_id(2)

    @pl.when(t == 0)
    def _():
        for h in range(blocks.heads):
            Z_ref[h] = initial_ref[0, h].astype(jnp.float32).T

    valid = tpu.valid_rows(blocks, t)
    chunk_decay = kind.load(decay_refs, t)

    def head(h):
        k = tpu.read(k_ref, h // blocks.group, blocks.key, valid)
        v = tpu.read(v_ref, h, blocks.value, valid)
        k_end, total = yield from chunk_decay.ends(h, k)
        Z = Z_ref[h]
        starts_ref[0, 0, h] = Z
        written = chunk_decay.write(matmul, h, v, k, k_end)
        yield
        Z_ref[h] = _decayed(Z, total) + written

    tpu.interleave(head(h) for h in range(blocks.heads))


def _gla_backward(*refs, kind, scale, inputs):
    (v_ref, do_ref, q_ref, k_ref, starts_ref, *decay_refs, dfinal_ref), refs = (
        refs[:inputs],
        refs[inputs:],
    )
    dq_ref, dk_ref, dv_ref, dinitial_ref, *dlog_refs, dZ_ref = refs
    blocks, matmul, t = kind.blocks, kind.matmul, pl.program_id(2)
    K, V = blocks.key, blocks.value

    @pl.when(t == 0)
    def _():
        for h in range(blocks.heads):
            dZ_ref[h] = dfinal_ref[0, h].astype(jnp.float32).T

    chunk_index = blocks.chunks - 1 - t
    valid = tpu.valid_rows(blocks, chunk_index)
    chunk_decay = kind.load(decay_refs, chunk_index)
    dqs, dks = {}, {}  # sums over the value heads of a key head

    def head(h):
        q, k = (tpu.read(ref, h // blocks.group, K, valid) for ref in (q_ref, k_ref))
        v = tpu.read(v_ref, h, V, valid)
        do = (scale * tpu.read(do_ref, h, V, valid).astype(jnp.float32)).astype(matmul.dtype)
        Z, dZ = starts_ref[0, 0, h], dZ_ref[h]
        dscores, dq_start, dk_end = matmul.nt(do, v), matmul.nn(do, Z), matmul.nn(v, dZ)
        chunk = yield from chunk_decay.products(h, q, k)
        dv, dv_chunk = matmul.nt(chunk.k_end, dZ), matmul.tn(chunk.scores, do)
        read = matmul.tn(do, chunk.q_start)
        dtotal = jnp.sum(Z * dZ, 0, keepdims=True)
        yield
        dv_ref[0, :, h * V : (h + 1) * V] = (dv + dv_chunk).astype(dv_ref.dtype)
        dZ_ref[h] = _decayed(dZ, chunk.total) + read
        of_chunk = yield from chunk_decay.adjoint(h, chunk, q, k, dscores, dq_start, dk_end, dtotal)
        gradients.store_decay(dlog_refs, h, of_chunk.log)
        at, last = h // blocks.group, h % blocks.group == blocks.group - 1
        for ref, sums, gradient in ((dq_ref, dqs, of_chunk.q), (dk_ref, dks, of_chunk.k)):
            sums[at] = sums[at] + gradient if at in sums else gradient
            if last:
                ref[0, :, at * K : (at + 1) * K] = sums[at].astype(ref.dtype)

    tpu.interleave(head(h) for h in range(blocks.heads))

    @pl.when(t == blocks.chunks - 1)
    def _():
        for h in range(blocks.heads):
            dinitial_ref[0, h] = dZ_ref[h].T
