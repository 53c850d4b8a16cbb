"""The last kernel of gated linear attention backward on GPU: the gradients of all chunks at once
(`pallas_gpu.py`)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, Inputs, Sizes, key_dtypes
from ...gpu.decay import token_log_gradient


def chunk_gradients(
    sizes: Sizes,
    inputs: Inputs,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None,
    do: jax.Array,
    S: jax.Array,
    dS: jax.Array,
) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """All chunks at once, from the states S at their starts and the gradients dS of those at their
    ends.

    Returns dq, dk [B, T, H, K]; with a decay per channel the cotangents of scores [B, H, GC, C],
    q_start and k_end [B, H, GC, K]. Then dv, and the cotangent of the logs: [B, T, H], [B, H, G] of
    a constant, of `total` [B, H, G, K]."""
    by_channel = inputs.scores is not None
    constant = decay_log is not None and decay_log.ndim == 1
    (of_key, key_tiles), (width, tiles) = (
        gpu.divided(size, 64) for size in (sizes.key, sizes.value)
    )
    shape = jax.ShapeDtypeStruct
    of_head = sizes.batch, sizes.heads
    if by_channel:
        outputs = [
            shape((*of_head, sizes.rows, sizes.chunk), sizes.dtype),
            shape((*of_head, sizes.rows, sizes.key), sizes.dtype),
            shape((*of_head, sizes.rows, sizes.key), sizes.dtype),
        ]
        of_log = [shape((*of_head, sizes.chunks, sizes.key), jnp.float32)]
    else:
        size = sizes.batch, sizes.length, sizes.heads, sizes.key
        outputs = [shape(size, dtype) for dtype in key_dtypes(q, k, sizes)]
        if decay_log is None:
            of_log = []
        elif constant:
            of_log = [shape((*of_head, sizes.chunks), jnp.float32)]
        else:
            of_log = [shape(decay_log.shape, decay_log.dtype)]

    def kernel(inputs, v, do, S, dS, *outputs):
        *of_keys, dv = outputs[: -len(of_log)] if of_log else outputs
        dlog = outputs[-1] if of_log else None
        matmul = gpu.Matmul(sizes.dtype)
        b, h, t = sizes.place()
        chunk, rows = Chunk(sizes, inputs, matmul, b, h, t), sizes.tokens(t)
        decay = chunk.decay()

        def key_tile(n: Any) -> tuple[gpu.Span, jax.Array, jax.Array]:
            keys = sizes.channels(n, of_key, sizes.key)
            return keys, chunk.keys(inputs.q, keys), chunk.keys(inputs.k, keys)

        def of_scores(n: Any, P: jax.Array) -> jax.Array:
            _, q, k = key_tile(n)
            return P + matmul.nt(q, k)

        def of_values(n: Any, dP: jax.Array) -> jax.Array:
            values = sizes.values(n, width)
            v_, do_ = (chunk.values(ref, values) for ref in (v, do))

            def of_state(n: Any, dv: jax.Array) -> jax.Array:
                keys, _, k = key_tile(n)
                return dv + matmul.nn(k, gpu.load(dS, b, h, t, keys, values))

            dv_ = lax.fori_loop(0, key_tiles, of_state, gpu.zeros(sizes.chunk, width))
            dv_ = decay.write(dv_) + sizes.scale * matmul.tn(P, do_)
            gpu.store(dv, dv_, b, rows, h, values)
            return dP + matmul.nt(do_, v_)

        if by_channel:
            P = chunk.scores()
        else:
            P = lax.fori_loop(0, key_tiles, of_scores, gpu.zeros(*(sizes.chunk,) * 2))
            P *= decay.weights
        dP = lax.fori_loop(0, tiles, of_values, gpu.zeros(*(sizes.chunk,) * 2))
        dP *= sizes.scale
        dscores = decay.weights * dP
        if by_channel:
            gpu.store(of_keys[0], dP, b, h, sizes.padded(t), sizes.square)

        def of_key_tile(n: Any, of_factors: Any) -> Any:
            keys, q, k = key_tile(n)

            def of_states(n: Any, sums: Any) -> Any:
                dq, dk, dtotal = sums
                values = sizes.values(n, width)
                v_, do_ = (chunk.values(ref, values) for ref in (v, do))
                S_, dS_ = (gpu.load(ref, b, h, t, keys, values) for ref in (S, dS))
                if of_log:
                    dtotal += (S_.astype(jnp.float32) * dS_.astype(jnp.float32)).sum(1)
                return dq + matmul.nt(do_, S_), dk + matmul.nt(v_, dS_), dtotal

            sums = *(gpu.zeros(sizes.chunk, of_key),) * 2, gpu.zeros(of_key)
            dq, dk, dtotal = lax.fori_loop(0, tiles, of_states, sums)
            dq *= sizes.scale
            if by_channel:
                gpu.store(of_keys[1], dq, b, h, sizes.padded(t), keys)
                gpu.store(of_keys[2], dk, b, h, sizes.padded(t), keys)
                gpu.store(dlog, dtotal, b, h, t, keys)
                return of_factors
            dq, dk = decay.read(dq), decay.write(dk)
            gpu.store(of_keys[0], dq + matmul.nn(dscores, k), b, rows, h, keys)
            gpu.store(of_keys[1], dk + matmul.tn(dscores, q), b, rows, h, keys)
            if dlog is None:
                return of_factors
            of_prefix, of_suffix, of_total = of_factors
            return (
                of_prefix + (q.astype(jnp.float32) * dq).sum(1),
                of_suffix + (k.astype(jnp.float32) * dk).sum(1),
                of_total + dtotal.sum(0),
            )

        of_factors = gpu.zeros(sizes.chunk), gpu.zeros(sizes.chunk), jnp.float32(0)
        of_factors = lax.fori_loop(0, key_tiles, of_key_tile, of_factors)
        if dlog is None or by_channel:
            return
        of_prefix, of_suffix, of_total = of_factors
        gradient = token_log_gradient(P * dP, of_prefix, of_suffix, decay.total * of_total, matmul)
        if not constant:
            gpu.store(dlog, gradient, b, rows, h)
        else:  # no token, no decay: what the sum over its row holds is not asked for
            valid = rows.index < sizes.length
            gpu.store(dlog, jnp.where(valid, gradient, 0.0).sum(0), b, h, t)

    results = gpu.call(
        "gla_chunk_gradients",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        (inputs, v, do, S, dS),
        (*outputs, shape(v.shape, v.dtype), *of_log),
        warps=sizes.warps,
        interpret=sizes.interpret,
    )
    at = len(outputs)
    return list(results[:at]), results[at], results[at + 1] if of_log else None
