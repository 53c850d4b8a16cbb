"""Gated linear attention on GPU: the kernel that computes the gradients of all chunks at once
(`__init__.py` has the equations)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, ChunkInputs, Sizes
from ...gpu.decay import DecaySums, TokenDecay, token_log_gradient
from ...gpu.gradients import ChunkGradients, store_log_gradient

MAX_WIDTH = 64  # key or value channels of a tile


class GradientInputs(NamedTuple):
    chunks: ChunkInputs
    v: Any  # [B, T, H, V]
    do: Any  # [B, T, H, V]
    S: Any  # [B, H, G, K, V], the states at the starts of chunks
    dS: Any  # [B, H, G, K, V], dS', the gradients of the states at their ends


def chunk_gradients(sizes: Sizes, inputs: GradientInputs, shapes: ChunkGradients) -> ChunkGradients:
    """Gradients of q, k, v and the decays, `shapes` with arrays."""
    key_width, key_tiles = gpu.tiling(sizes.key, MAX_WIDTH)
    value_width, value_tiles = gpu.tiling(sizes.value, MAX_WIDTH)

    def kernel(refs: GradientInputs, out: ChunkGradients) -> None:
        matmul = gpu.Matmul(sizes.dtype)
        chunk = Chunk(sizes, refs.chunks, matmul, *sizes.program())
        program = _Program(
            refs, out, chunk, chunk.decay(), key_width, key_tiles, value_width, value_tiles
        )
        P = _scores(program)  # [C, C]
        dP = _value_gradients(program, P)  # [C, C]
        sums = _key_gradients(program, dP)
        if out.dlog is not None:
            dlog = token_log_gradient(program.decay, P * dP, sums, matmul)  # [C]
            store_log_gradient(chunk, out.dlog, dlog)

    return gpu.call(
        "gla_chunk_gradients",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        inputs,
        shapes,
        warps=sizes.warps,
        interpret=sizes.interpret,
    )


@dataclass(frozen=True)
class _Program:
    """A program of the kernel, which has one chunk."""

    refs: GradientInputs
    out: ChunkGradients
    chunk: Chunk
    decay: TokenDecay
    key_width: int
    key_tiles: int
    value_width: int
    value_tiles: int

    def keys(self, n: Any) -> gpu.Span:
        """The n-th tile of the key channels."""
        sizes = self.chunk.sizes
        return sizes.channels(n, self.key_width, sizes.key)

    def values(self, n: Any) -> gpu.Span:
        """The n-th tile of the value channels."""
        return self.chunk.sizes.values(n, self.value_width)


def _scores(program: _Program) -> jax.Array:
    """P [C, C]."""
    chunk, sizes = program.chunk, program.chunk.sizes
    if program.refs.chunks.scores is not None:
        return chunk.padded(program.refs.chunks.scores, sizes.columns)

    def add_keys(n: Any, QK: jax.Array) -> jax.Array:
        keys = program.keys(n)
        q, k = chunk.queries(keys), chunk.keys(keys)  # [C, K]
        return QK + chunk.matmul.nt(q, k)

    QK = lax.fori_loop(0, program.key_tiles, add_keys, gpu.zeros(sizes.chunk, sizes.chunk))
    return QK * program.decay.weights  # Eq. 1


def _value_gradients(program: _Program, P: jax.Array) -> jax.Array:
    """dP [C, C]; writes dV."""
    refs, chunk, decay = program.refs, program.chunk, program.decay
    sizes, matmul = chunk.sizes, chunk.matmul

    def add_values(n: Any, dP: jax.Array) -> jax.Array:
        values = program.values(n)
        v, do = chunk.values(refs.v, values), chunk.values(refs.do, values)  # [C, V]

        def add_keys(n: Any, K_dS: jax.Array) -> jax.Array:
            keys = program.keys(n)
            k = chunk.keys(keys)  # [C, K]
            return K_dS + matmul.nn(k, chunk.boundary(refs.dS, keys, values))

        K_dS = gpu.zeros(sizes.chunk, program.value_width)
        K_dS = lax.fori_loop(0, program.key_tiles, add_keys, K_dS)  # [C, V]
        dv = decay.times_suffix(K_dS) + sizes.scale * matmul.tn(P, do)  # [C, V]  Eq. 6
        gpu.store(program.out.dv, dv, chunk.b, sizes.tokens(chunk.t), chunk.h, values)
        return dP + matmul.nt(do, v)

    dP = lax.fori_loop(0, program.value_tiles, add_values, gpu.zeros(sizes.chunk, sizes.chunk))
    dP *= sizes.scale  # Eq. 5
    if program.out.channels is not None:
        rows = sizes.padded(chunk.t)
        gpu.store(program.out.channels.scores, dP, chunk.b, chunk.h, rows, sizes.columns)
    return dP


def _key_gradients(program: _Program, dP: jax.Array) -> DecaySums:
    """What the gradient of the logs needs; writes dQ and dK, or with a decay for each channel what
    `channel_scores_adjoint` takes."""
    refs, out, chunk, decay = program.refs, program.out, program.chunk, program.decay
    sizes, matmul = chunk.sizes, chunk.matmul
    b, h, t, tokens = chunk.b, chunk.h, chunk.t, sizes.tokens(chunk.t)
    dscores = decay.weights * dP  # [C, C]
    has_decay = out.dlog is not None or out.channels is not None

    def key_tile(n: Any, sums: DecaySums) -> DecaySums:
        keys = program.keys(n)
        q, k = chunk.queries(keys), chunk.keys(keys)  # [C, K]

        def add_values(n: Any, products: Any) -> Any:
            dq, dk, dtotal = products
            values = program.values(n)
            v, do = chunk.values(refs.v, values), chunk.values(refs.do, values)  # [C, V]
            S, dS = (chunk.boundary(ref, keys, values) for ref in (refs.S, refs.dS))  # [K, V]
            if has_decay:
                dtotal += (S.astype(jnp.float32) * dS.astype(jnp.float32)).sum(1)
            return dq + matmul.nt(do, S), dk + matmul.nt(v, dS), dtotal

        products = *(gpu.zeros(sizes.chunk, program.key_width),) * 2, gpu.zeros(program.key_width)
        # dO S^T and V dS'^T [C, K], and dtotal [K].
        dq, dk, dtotal = lax.fori_loop(0, program.value_tiles, add_values, products)
        dq *= sizes.scale
        if out.channels is not None:
            gpu.store(out.channels.q_start, dq, b, h, sizes.padded(t), keys)
            gpu.store(out.channels.k_end, dk, b, h, sizes.padded(t), keys)
            gpu.store(out.channels.total, dtotal, b, h, t, keys)
            return sums
        dq, dk = decay.times_prefix(dq), decay.times_suffix(dk)
        gpu.store(out.dq, dq + matmul.nn(dscores, k), b, tokens, h, keys)  # Eq. 7
        gpu.store(out.dk, dk + matmul.tn(dscores, q), b, tokens, h, keys)  # Eq. 8
        if out.dlog is None:
            return sums
        return DecaySums(
            sums.prefix_term + (q.astype(jnp.float32) * dq).sum(1),
            sums.suffix_term + (k.astype(jnp.float32) * dk).sum(1),
            sums.dtotal + dtotal.sum(0),
        )

    return lax.fori_loop(0, program.key_tiles, key_tile, DecaySums.zeros(sizes.chunk))
