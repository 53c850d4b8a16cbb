"""The delta rule on GPU: the kernel that computes the gradients of all chunks at once
(`__init__.py` has the equations)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, Sizes
from ...gpu.decay import DecaySums, TokenDecay, token_log_gradient
from ...gpu.gradients import ChunkGradients, store_log_gradient
from .walks import KernelInputs, WalkOutputs, Writes


class GradientInputs(NamedTuple):
    inputs: KernelInputs
    writes: Writes
    do: Any  # [B, T, H, V]
    forward: WalkOutputs  # of `walk`: S and N
    backward: WalkOutputs  # of `walk_back`: dS' and dN


def chunk_gradients(sizes: Sizes, inputs: GradientInputs, shapes: ChunkGradients) -> ChunkGradients:
    """Gradients of q, k, v, beta and the decays, `shapes` with arrays."""
    max_width = 64 if sizes.dtype == jnp.bfloat16 else 32
    key_width, key_tiles = gpu.tiling(sizes.key, max_width)
    value_width, value_tiles = gpu.tiling(sizes.value, max_width)

    def kernel(refs: GradientInputs, out: ChunkGradients) -> None:
        matmul = gpu.Matmul(sizes.dtype)
        chunk = Chunk(sizes, refs.inputs.chunks, matmul, *sizes.program())
        b, h, tokens = chunk.b, chunk.h, sizes.tokens(chunk.t)
        beta = gpu.load(refs.inputs.beta, b, tokens, h).astype(jnp.float32)  # [C]
        program = _Program(
            refs, out, chunk, chunk.decay(), beta, key_width, key_tiles, value_width, value_tiles
        )
        KK = _key_scores(program)  # [C, C]
        dP, dA, dbeta = _value_gradients(program)  # [C, C], [C, C], [C]
        scores, dbeta = _score_gradients(program, KK, dP, dA, dbeta)
        dbeta, sums = _key_gradients(program, scores, dbeta)
        gpu.store(out.dbeta, dbeta, b, tokens, h)
        if out.dlog is not None:
            dlog = token_log_gradient(program.decay, scores.weights_term, sums, matmul)  # [C]
            store_log_gradient(chunk, out.dlog, dlog)

    return gpu.call(
        "delta_chunk_gradients",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        inputs,
        shapes,
        warps=8,
        interpret=sizes.interpret,
    )


@dataclass(frozen=True)
class _Program:
    """A program of the kernel, which has one chunk."""

    refs: GradientInputs
    out: ChunkGradients
    chunk: Chunk
    decay: TokenDecay
    beta: jax.Array  # [C] float32
    key_width: int
    key_tiles: int
    value_width: int
    value_tiles: int

    def keys(self, n: Any) -> gpu.Span:
        """The n-th tile of the key channels."""
        sizes = self.chunk.sizes
        return sizes.channels(n, self.key_width, sizes.key)

    def value_tile(self, n: Any) -> tuple[gpu.Span, jax.Array, jax.Array, jax.Array]:
        """The n-th tile of the value channels, and its N, D (Eq. 10) and dO [C, V]."""
        chunk, refs = self.chunk, self.refs
        values = chunk.sizes.values(n, self.value_width)
        N, dN = (chunk.padded(ref, values) for ref in (refs.forward.N, refs.backward.N))
        M = chunk.padded(refs.writes.M, chunk.sizes.columns)  # [C, C]
        D = gpu.Matmul(chunk.sizes.dtype, fine=True).tn(M, dN)
        return values, N, D, chunk.values(refs.do, values)


def _key_scores(program: _Program) -> jax.Array:
    """KK [C, C]."""
    chunk, sizes = program.chunk, program.chunk.sizes
    if program.refs.inputs.key_scores is not None:
        return chunk.padded(program.refs.inputs.key_scores, sizes.columns)

    def add_keys(n: Any, KK: jax.Array) -> jax.Array:
        k = chunk.keys(program.keys(n))  # [C, K]
        return KK + chunk.matmul.nt(k, k)

    KK = lax.fori_loop(0, program.key_tiles, add_keys, gpu.zeros(sizes.chunk, sizes.chunk))
    KK *= program.decay.weights
    row, column = gpu.indices(sizes.chunk, sizes.chunk)
    return jnp.where(row > column, KK, 0.0)  # Eq. 1


def _value_gradients(program: _Program) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dP [C, C], dA [C, C] and the first term of dbeta [C]; writes dV."""
    chunk, sizes, matmul = program.chunk, program.chunk.sizes, program.chunk.matmul
    C, tokens = sizes.chunk, sizes.tokens(chunk.t)

    def value_tile(n: Any, sums: Any) -> Any:
        dP, dA, dbeta = sums
        values, N, D, do = program.value_tile(n)
        v = chunk.values(program.refs.inputs.v, values).astype(jnp.float32)  # [C, V]
        dv = program.beta[:, None] * D  # [C, V]  Eq. 12
        gpu.store(program.out.dv, dv, chunk.b, tokens, chunk.h, values)
        dP, dA = dP + matmul.nt(do, N), dA - matmul.nt(D, N)
        return dP, dA, dbeta + (D * v).sum(1)

    sums = gpu.zeros(C, C), gpu.zeros(C, C), gpu.zeros(C)
    dP, dA, dbeta = lax.fori_loop(0, program.value_tiles, value_tile, sums)
    row, column = gpu.indices(C, C)
    return sizes.scale * dP, jnp.where(row > column, dA, 0.0), dbeta  # Eq. 11


class _ScoreGradients(NamedTuple):
    """[C, C] each; the first two in the dtype of matmuls."""

    queries: jax.Array  # W . dP
    keys: jax.Array  # W . dKK, and its transpose added
    weights_term: jax.Array  # W dW


def _score_gradients(
    program: _Program, KK: jax.Array, dP: jax.Array, dA: jax.Array, dbeta: jax.Array
) -> tuple[_ScoreGradients, jax.Array]:
    """The gradients of the scores, and dbeta with its second term."""
    chunk, out, sizes = program.chunk, program.out, program.chunk.sizes
    rows, columns = sizes.padded(chunk.t), sizes.columns
    dKK, dbeta = program.beta[:, None] * dA, dbeta + (dA * KK).sum(1)  # Eq. 13
    P = chunk.padded(program.refs.writes.scores, columns).astype(jnp.float32)
    weights_term = P * dP + KK * dKK
    if out.channels is not None:
        gpu.store(out.channels.scores, dP, chunk.b, chunk.h, rows, columns)
        gpu.store(out.channels.key_scores, dKK, chunk.b, chunk.h, rows, columns)
    dP, dKK = program.decay.weights * dP, program.decay.weights * dKK
    dKK = (dKK + dKK.T).astype(sizes.dtype)
    return _ScoreGradients(dP.astype(sizes.dtype), dKK, weights_term), dbeta


def _key_gradients(
    program: _Program, scores: _ScoreGradients, dbeta: jax.Array
) -> tuple[jax.Array, DecaySums]:
    """dbeta with its last term, and what the gradient of the logs needs; writes dQ and dK, or with
    a decay for each channel what `channel_scores_adjoint` takes."""
    refs, out, chunk, decay = program.refs, program.out, program.chunk, program.decay
    sizes, matmul = chunk.sizes, chunk.matmul
    b, h, t, tokens, rows = chunk.b, chunk.h, chunk.t, sizes.tokens(chunk.t), sizes.padded(chunk.t)

    def key_tile(n: Any, carry: Any) -> Any:
        dbeta, sums = carry
        keys = program.keys(n)
        dq, DS, dk_end, dtotal = _state_products(program, keys)  # [C, K] three times, and [K]
        dq, dk_start = sizes.scale * dq, -program.beta[:, None] * DS
        if out.channels is not None:
            k = chunk.padded(refs.inputs.k_start, keys).astype(jnp.float32)  # [C, K]
            gpu.store(out.channels.q_start, dq, b, h, rows, keys)
            gpu.store(out.channels.k_end, dk_end, b, h, rows, keys)
            gpu.store(out.channels.k_start, dk_start, b, h, rows, keys)
            gpu.store(out.channels.total, dtotal, b, h, t, keys)
            return dbeta - (k * DS).sum(1), sums
        q, k = chunk.queries(keys), chunk.keys(keys)  # [C, K]
        q_float32, k_float32 = q.astype(jnp.float32), k.astype(jnp.float32)
        DS, dq, dk_start = (decay.times_prefix(x) for x in (DS, dq, dk_start))
        dk_end = decay.times_suffix(dk_end)
        dbeta -= (k_float32 * DS).sum(1)  # Eq. 13
        sums = DecaySums(
            sums.prefix_term + (q_float32 * dq + k_float32 * dk_start).sum(1),
            sums.suffix_term + (k_float32 * dk_end).sum(1),
            sums.dtotal + dtotal.sum(0),
        )
        gpu.store(out.dq, dq + matmul.nn(scores.queries, k), b, tokens, h, keys)  # Eq. 14
        dk = dk_start + dk_end + matmul.tn(scores.queries, q) + matmul.nn(scores.keys, k)
        gpu.store(out.dk, dk, b, tokens, h, keys)  # Eq. 15
        return dbeta, sums

    carry = dbeta, DecaySums.zeros(sizes.chunk)
    return lax.fori_loop(0, program.key_tiles, key_tile, carry)


def _state_products(
    program: _Program, keys: gpu.Span
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """dO S^T, D S^T and N dS'^T [C, K], and dtotal [K]."""
    refs, chunk, matmul = program.refs, program.chunk, program.chunk.matmul

    def value_tile(n: Any, sums: Any) -> Any:
        dq, DS, dk_end, dtotal = sums
        values, N, D, do = program.value_tile(n)
        S, dS = (chunk.boundary(ref, keys, values) for ref in (refs.forward.S, refs.backward.S))
        dtotal += (S.astype(jnp.float32) * dS.astype(jnp.float32)).sum(1)
        dq, DS = dq + matmul.nt(do, S), DS + matmul.nt(D, S)
        return dq, DS, dk_end + matmul.nt(N, dS), dtotal

    zeros = gpu.zeros(chunk.sizes.chunk, program.key_width)
    sums = zeros, zeros, zeros, gpu.zeros(program.key_width)
    return lax.fori_loop(0, program.value_tiles, value_tile, sums)
