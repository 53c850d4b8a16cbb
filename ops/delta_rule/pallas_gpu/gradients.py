"""The last kernel of the delta rule backward on GPU: the gradients of all chunks at once
(`pallas_gpu.py`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, Sizes, key_dtypes
from ...gpu.decay import ChannelDecay, token_log_gradient
from .walks import Given, Walked, Writes


class Gradients(NamedTuple):
    """dq, dk [B, T, H, K] and dlog [B, T, H] or, of a constant, [B, H, G]; or, with a decay per
    channel, by_channel."""

    dv: Any
    dbeta: Any
    dq: Any = None
    dk: Any = None
    dlog: Any = None
    by_channel: Any = None


def _gradient_shapes(
    sizes: Sizes, given: Given, q: jax.Array, k: jax.Array, log: jax.Array | None
) -> Gradients:
    of_head = sizes.batch, sizes.heads
    shape = jax.ShapeDtypeStruct
    dv, dbeta = (shape(x.shape, x.dtype) for x in (given.v, given.beta))
    if given.key_scores is not None:
        scores, keys = (
            shape((*of_head, sizes.rows, size), sizes.dtype) for size in (sizes.chunk, sizes.key)
        )
        total = shape((*of_head, sizes.chunks, sizes.key), jnp.float32)
        by_channel = ChannelDecay(scores, keys, keys, total, scores, keys)
        return Gradients(dv, dbeta, by_channel=by_channel)
    size = sizes.batch, sizes.length, sizes.heads, sizes.key
    dq, dk = (shape(size, dtype) for dtype in key_dtypes(q, k, sizes))
    if log is None:
        return Gradients(dv, dbeta, dq, dk)
    constant = shape((*of_head, sizes.chunks), jnp.float32)
    dlog = constant if log.ndim == 1 else shape(log.shape, log.dtype)
    return Gradients(dv, dbeta, dq, dk, dlog)


def chunk_gradients(
    sizes: Sizes,
    given: Given,
    writes: Writes,
    q: jax.Array,
    k: jax.Array,
    log: jax.Array | None,
    do: jax.Array,
    states: Walked,
    dstates: Walked,
) -> Gradients:
    """All chunks at once, from what the walks kept."""
    most = 64 if sizes.dtype == jnp.bfloat16 else 32
    (of_key, key_tiles), (width, tiles) = (
        gpu.divided(size, most) for size in (sizes.key, sizes.value)
    )
    constant = log is not None and log.ndim == 1
    C = sizes.chunk

    def kernel(given, writes, do, states, dstates, out):
        matmul = gpu.Matmul(sizes.dtype)
        fine = gpu.Matmul(sizes.dtype, fine=True)
        b, h, t = sizes.place()
        inputs = given.of_reads
        chunk = Chunk(sizes, inputs, matmul, b, h, t)
        tokens, rows, square = sizes.tokens(t), sizes.padded(t), sizes.square
        row, column = gpu.indices(C, C)
        beta = gpu.load(given.beta, b, tokens, h).astype(jnp.float32)
        decay, by_channel = chunk.decay(), out.by_channel

        def key_tile(n: Any) -> gpu.Span:
            return sizes.channels(n, of_key, sizes.key)

        def value_tile(n: Any) -> tuple[gpu.Span, jax.Array, jax.Array, jax.Array]:
            """N, D and dO."""
            values = sizes.values(n, width)
            N, dN = (gpu.load(x.inside, b, h, rows, values) for x in (states, dstates))
            D = fine.tn(gpu.load(writes.M, b, h, rows, square), dN)
            return values, N, D, chunk.values(do, values)

        def of_keys(n: Any, KK: jax.Array) -> jax.Array:
            k = chunk.keys(inputs.k, key_tile(n))
            return KK + matmul.nt(k, k)

        def of_values(n: Any, sums: Any) -> Any:
            dP, dA, dbeta = sums
            values, N, D, do_ = value_tile(n)
            v = chunk.values(given.v, values).astype(jnp.float32)
            gpu.store(out.dv, beta[:, None] * D, b, tokens, h, values)
            dP, dA = dP + matmul.nt(do_, N), dA - matmul.nt(D, N)
            return dP, dA, dbeta + (D * v).sum(1)

        if by_channel is not None:
            KK = gpu.load(given.key_scores, b, h, rows, square)
        else:
            KK = lax.fori_loop(0, key_tiles, of_keys, gpu.zeros(C, C)) * decay.weights
            KK = jnp.where(row > column, KK, 0.0)
        sums = gpu.zeros(C, C), gpu.zeros(C, C), gpu.zeros(C)
        dP, dA, dbeta = lax.fori_loop(0, tiles, of_values, sums)
        dP, dA = sizes.scale * dP, jnp.where(row > column, dA, 0.0)
        dKK, dbeta = beta[:, None] * dA, dbeta + (dA * KK).sum(1)
        P = gpu.load(writes.scores, b, h, rows, square).astype(jnp.float32)
        of_weights = P * dP + KK * dKK
        if by_channel is not None:
            gpu.store(by_channel.scores, dP, b, h, rows, square)
            gpu.store(by_channel.key_scores, dKK, b, h, rows, square)
        dscores, dKK = decay.weights * dP, decay.weights * dKK
        dKK = (dKK + dKK.T).astype(sizes.dtype)
        dscores = dscores.astype(sizes.dtype)

        def of_key_tile(n: Any, of_factors: Any) -> Any:
            dbeta, of_prefix, of_suffix, of_total = of_factors
            keys = key_tile(n)

            def of_states(n: Any, sums: Any) -> Any:
                dq, DS, dk_end, dtotal = sums
                values, N, D, do_ = value_tile(n)
                S, dS = (gpu.load(x.boundary, b, h, t, keys, values) for x in (states, dstates))
                dtotal += (S.astype(jnp.float32) * dS.astype(jnp.float32)).sum(1)
                dq, DS = dq + matmul.nt(do_, S), DS + matmul.nt(D, S)
                return dq, DS, dk_end + matmul.nt(N, dS), dtotal

            sums = *(gpu.zeros(C, of_key),) * 3, gpu.zeros(of_key)
            dq, DS, dk_end, dtotal = lax.fori_loop(0, tiles, of_states, sums)
            dq, dk_start = sizes.scale * dq, -beta[:, None] * DS
            if by_channel is not None:
                k = gpu.load(given.key_start, b, h, rows, keys).astype(jnp.float32)
                gpu.store(by_channel.q_start, dq, b, h, rows, keys)
                gpu.store(by_channel.k_end, dk_end, b, h, rows, keys)
                gpu.store(by_channel.key_start, dk_start, b, h, rows, keys)
                gpu.store(by_channel.total, dtotal, b, h, t, keys)
                return dbeta - (k * DS).sum(1), of_prefix, of_suffix, of_total
            q, k = (chunk.keys(x, keys) for x in (inputs.q, inputs.k))
            q_, k_ = (x.astype(jnp.float32) for x in (q, k))
            DS, dq, dk_start = (decay.read(x) for x in (DS, dq, dk_start))
            dk_end = decay.write(dk_end)
            of_factors = (
                dbeta - (k_ * DS).sum(1),
                of_prefix + (q_ * dq + k_ * dk_start).sum(1),
                of_suffix + (k_ * dk_end).sum(1),
                of_total + dtotal.sum(0),
            )
            gpu.store(out.dq, dq + matmul.nn(dscores, k), b, tokens, h, keys)
            dk = dk_start + dk_end + matmul.tn(dscores, q) + matmul.nn(dKK, k)
            gpu.store(out.dk, dk, b, tokens, h, keys)
            return of_factors

        of_factors = dbeta, gpu.zeros(C), gpu.zeros(C), jnp.float32(0)
        dbeta, of_prefix, of_suffix, of_total = lax.fori_loop(0, key_tiles, of_key_tile, of_factors)
        gpu.store(out.dbeta, dbeta, b, tokens, h)
        if out.dlog is None:
            return
        dlog = token_log_gradient(of_weights, of_prefix, of_suffix, decay.total * of_total, matmul)
        if not constant:
            gpu.store(out.dlog, dlog, b, tokens, h)
        else:  # no token, no decay: what its row holds is not asked for
            valid = tokens.index < sizes.length
            gpu.store(out.dlog, jnp.where(valid, dlog, 0.0).sum(0), b, h, t)

    (gradients,) = gpu.call(
        "delta_chunk_gradients",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        (given, writes, do, states, dstates),
        [_gradient_shapes(sizes, given, q, k, log)],
        warps=8,
        interpret=sizes.interpret,
    )
    return gradients
