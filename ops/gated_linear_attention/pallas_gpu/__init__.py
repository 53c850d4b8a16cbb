"""Gated linear attention on NVIDIA GPUs: chunks in order where states pass, all chunks at once
where they need not.

With P the scores of a chunk with their decays and `scale`, r_i = scale prefix_i and w_j = suffix_j
(`pallas_gpu_decay.py`):

    O  = r (Q S) + P V          S' = total S + K^T (w V)

Forward is one kernel: a program holds the state of one head and some of its value channels in
registers and walks over the chunks. With few heads these programs do not fill the chip; then time
is cut into parts, a first kernel computes what each part adds to the state and how it decays it,
the states at the starts of the parts follow from these, and the second kernel runs on all parts at
once.

Backward, with dS' the gradient of the state at a chunk's end:

    dS = total dS' + Q^T (r dO)      dP = dO V^T                    dV = w (K dS') + P^T dO
    dQ = r (dO S^T) + (dP W) K       dK = w (V dS'^T) + (dP W)^T Q

Two kernels walk over the chunks and write the states S and the gradients dS' at chunk boundaries,
rounded to the dtype of the matmuls that read them; then one kernel takes all chunks at once.
Between forward and backward nothing is kept.

A decay per channel enters before: `channel_scores` writes P, Q with r and K with w to memory, and
the kernels here read them in the place of q and k; of a long sequence piece by piece
(`pallas_gpu_pieces.py`)."""

import functools
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...framework import segments
from ...gpu import pieces
from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, Inputs, Sizes, chunk_length, key_dtypes
from ...gpu.decay import ChannelDecay, channel_scores, channel_scores_adjoint
from .gradients import chunk_gradients

MAX_SIZE = 256  # of K and V: what fits registers
SUPPORTED = f"float32 or bfloat16, K and V up to {MAX_SIZE}"


def supports(q, k, v, decay_log, initial_state, segment_ids, *_, scale) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del decay_log, initial_state, segment_ids, scale
    return (
        gpu.available()
        and max(q.shape[-1], v.shape[-1]) <= MAX_SIZE
        and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in (q, k, v))
    )


def _inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
    interpret: bool,
) -> tuple[Sizes, Inputs]:
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    dtype = gpu.matmul_dtype(q, k, v)
    chunk = chunk_length(length)
    numbers = segments.numbers(segment_ids)
    if not _by_channel(decay_log):
        sizes = Sizes(batch, length, heads, key, value, chunk, dtype, scale, interpret)
        return sizes, Inputs(q, k, decay_log, numbers)
    made = channel_scores(q, k, decay_log, numbers, scale, chunk, dtype, interpret=interpret)
    sizes = Sizes(batch, length, heads, key, value, chunk, dtype, 1.0, interpret)
    return sizes, Inputs(made.q_start, made.k_end, scores=made.scores, total=made.total)


# --- Forward
# --------------------------------------------------------------------------------------------------


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, interpret=False):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    rule = functools.partial(_forward, scale=scale, interpret=interpret)
    tokens = q, k, v, decay_log
    if not _by_channel(decay_log):
        return rule(*tokens, initial_state, segment_ids)
    return pieces.forward(rule, tokens, initial_state, segment_ids)


def _by_channel(decay_log: jax.Array | None) -> TypeGuard[jax.Array]:
    """Whether the kernels keep something of every token for each other."""
    return decay_log is not None and decay_log.ndim == 4


def _forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, interpret):
    """Of a piece of time."""
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, interpret)
    # The tile of the state that a program holds while it also multiplies.
    in_registers = 8192 if sizes.dtype == jnp.bfloat16 else 4096
    most = max(gpu.MIN_TILE, in_registers // sizes.keys.size)
    width, tiles = gpu.divided(sizes.value, min(64, most))
    parts = gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tiles)
    starts = _part_starts(sizes, inputs, v, initial_state, parts, reverse=False)
    per_part = pl.cdiv(sizes.chunks, parts)

    def kernel(inputs, v, starts, o, final):
        matmul = gpu.Matmul(sizes.dtype)
        b, h, x = sizes.place()
        n, part = x % tiles, x // tiles
        keys, values = sizes.keys, sizes.values(n, width)

        def step(t: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, inputs, matmul, b, h, t)
            q, k = (chunk.keys(ref, keys) for ref in (inputs.q, inputs.k))
            decay, v_ = chunk.decay(), chunk.values(v, values)
            P = decay.weights * matmul.nt(q, k) if inputs.scores is None else chunk.scores()
            o_ = decay.read(matmul.nn(q, S)) + matmul.nn(P, v_)
            gpu.store(o, sizes.scale * o_, b, sizes.tokens(t), h, values)
            return chunk.keep(decay, S, keys) + matmul.tn(k, decay.write(v_))

        S = gpu.load(starts, b, part, h, keys, values).astype(jnp.float32)
        first = part * per_part
        S = lax.fori_loop(first, jnp.minimum(first + per_part, sizes.chunks), step, S)
        gpu.store(final, S, b, part, h, keys, values)

    o, final = gpu.call(
        "gla_forward",
        kernel,
        (tiles * parts, sizes.batch * sizes.heads),
        (inputs, v, starts),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(starts.shape, jnp.float32)),
        warps=sizes.warps if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )
    return o, final[:, -1]


# --- States at the boundaries of chunks
# -------------------------------------------------------------------------------


def _walk(
    sizes: Sizes, inputs: Inputs, x: jax.Array, starts: jax.Array, reverse: bool, keep: bool
) -> list[jax.Array]:
    """Passes states over the chunks of each part: S' = total S + K^T (w x), or reverse dS = total
    dS' + Q^T (r x).

    x: [B, T, H, V]; starts [B, parts, H, K, V], those that enter the parts. Returns, with `keep`,
    the states that enter each chunk [B, H, G, K, V], and those that leave the parts."""
    (of_keys, key_tiles), (width, tiles) = (
        gpu.divided(size, 64) for size in (sizes.key, sizes.value)
    )
    parts = starts.shape[1]
    per_part = pl.cdiv(sizes.chunks, parts)

    def kernel(inputs, x, starts, *outputs):
        *kept, final = outputs
        matmul = gpu.Matmul(sizes.dtype)
        b, h, at = sizes.place()
        n, at = at % tiles, at // tiles
        m, part = at % key_tiles, at // key_tiles
        keys = sizes.channels(m, of_keys, sizes.key)
        values = sizes.values(n, width)
        first = part * per_part
        last = jnp.minimum(first + per_part, sizes.chunks) - 1

        def step(i: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, inputs, matmul, b, h, last - i if reverse else i)
            for ref in kept:
                gpu.store(ref, S, b, h, chunk.t, keys, values)
            decay, x_ = chunk.decay(), chunk.values(x, values)
            S = chunk.keep(decay, S, keys)
            if not reverse:
                return S + matmul.tn(chunk.keys(inputs.k, keys), decay.write(x_))
            read = sizes.scale * decay.read(x_.astype(jnp.float32))
            return S + matmul.tn(chunk.keys(inputs.q, keys), read)

        S = gpu.load(starts, b, part, h, keys, values).astype(jnp.float32)
        bounds = (0, last - first + 1) if reverse else (first, last + 1)
        S = lax.fori_loop(*bounds, step, S)
        gpu.store(final, S, b, part, h, keys, values)

    shape = sizes.batch, sizes.heads, sizes.chunks, sizes.key, sizes.value
    kept = [jax.ShapeDtypeStruct(shape, sizes.dtype)] if keep else []
    return gpu.call(
        "gla_gradient_states" if reverse else "gla_states",
        kernel,
        (tiles * key_tiles * parts, sizes.batch * sizes.heads),
        (inputs, x, starts),
        (*kept, jax.ShapeDtypeStruct(starts.shape, jnp.float32)),
        warps=sizes.warps,
        interpret=sizes.interpret,
    )


def _boundary_states(
    sizes: Sizes, inputs: Inputs, parts: int, x: jax.Array, entering: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """The states that enter each chunk [B, H, G, K, V] and the one that leaves the last (reverse:
    the first)."""
    starts = _part_starts(sizes, inputs, x, entering, parts, reverse)
    states, final = _walk(sizes, inputs, x, starts, reverse, keep=True)
    return states, final[:, 0 if reverse else -1]


def _parts_of_walk(sizes: Sizes) -> int:
    tiles = (gpu.divided(size, 64)[1] for size in (sizes.key, sizes.value))
    programs = math.prod(tiles) * sizes.batch * sizes.heads
    return gpu.split_time(sizes.chunks, programs)


def _part_starts(
    sizes: Sizes, inputs: Inputs, x: jax.Array, entering: jax.Array, parts: int, reverse: bool
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V], float32; entering: that of the first
    (reverse: the last)."""
    entering = entering.astype(jnp.float32)[:, None]
    if parts == 1:
        return entering
    zeros = jnp.zeros((sizes.batch, parts, *entering.shape[2:]), jnp.float32)
    (added,) = _walk(sizes, inputs, x, zeros, reverse, keep=False)
    totals = _part_totals(sizes, inputs, parts)
    return gpu.part_starts(jnp.multiply, totals, added, entering, reverse)


def _part_totals(sizes: Sizes, inputs: Inputs, parts: int) -> jax.Array:
    """[B or 1, parts, H or 1, K or 1, 1], what is left of a state after a part."""
    per_part = pl.cdiv(sizes.chunks, parts)
    if inputs.total is not None:
        total = jnp.pad(
            inputs.total,
            ((0, 0), (0, 0), (0, parts * per_part - sizes.chunks), (0, 0)),
            constant_values=1.0,
        )
        total = total.reshape(*total.shape[:2], parts, per_part, -1).prod(3)
        return total.swapaxes(1, 2)[..., None]
    tokens = per_part * sizes.chunk
    place = jnp.arange(parts) * tokens
    first, last = (jnp.minimum(x, sizes.length) for x in (place, place + tokens))
    if inputs.log is None:
        total = jnp.ones((1, parts, 1), jnp.float32)
    elif inputs.log.ndim == 1:
        log = inputs.log.astype(jnp.float32)
        total = jnp.exp((last - first)[None, :, None] * log[None, None, :])
    else:
        pad = parts * tokens - sizes.length
        log = jnp.pad(inputs.log.astype(jnp.float32), ((0, 0), (0, pad), (0, 0)))
        total = jnp.exp(log.reshape(sizes.batch, parts, tokens, -1).sum(2))
    if inputs.numbers is not None:
        before = inputs.numbers[:, jnp.maximum(first - 1, 0)]
        passes = before == inputs.numbers[:, jnp.maximum(last - 1, 0)]
        total = jnp.where(passes[..., None], total, 0.0)
    return total[..., None, None]


# --- Backward
# --------------------------------------------------------------------------------------------------


def backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, interpret=False
):
    """Cotangents of q, k, v, decay_log and initial_state."""
    rule = functools.partial(_backward, scale=scale, interpret=interpret)
    tokens, rest = (q, k, v, decay_log), (initial_state, segment_ids, do, dfinal_state)
    if not _by_channel(decay_log):
        return rule(*tokens, *rest)
    final_state = functools.partial(_final_state, scale=scale, interpret=interpret)
    return pieces.backward(rule, final_state, tokens, *rest)


def _final_state(q, k, v, decay_log, initial_state, segment_ids, *, scale, interpret):
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, interpret)
    parts = _parts_of_walk(sizes)
    starts = _part_starts(sizes, inputs, v, initial_state, parts, reverse=False)
    (final,) = _walk(sizes, inputs, v, starts, reverse=False, keep=False)
    return final[:, -1]


def _backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, interpret
):
    """Of a piece of time."""
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, interpret)
    walk = functools.partial(_boundary_states, sizes, inputs, _parts_of_walk(sizes))
    S, _ = walk(v, initial_state, reverse=False)
    dS, dinitial_state = walk(do, dfinal_state, reverse=True)
    of_keys, dv, dlog = chunk_gradients(sizes, inputs, q, k, v, decay_log, do, S, dS)
    if inputs.scores is not None:
        *of_keys, dlog = channel_scores_adjoint(
            q,
            k,
            decay_log,
            segments.numbers(segment_ids),
            ChannelDecay(*of_keys, total=dlog),
            scale,
            sizes.chunk,
            sizes.dtype,
            (*key_dtypes(q, k, sizes), decay_log.dtype),
            interpret=interpret,
        )
    dq, dk = (
        x.reshape(*q.shape[:3], -1, sizes.key).sum(3) if x.shape != q.shape else x for x in of_keys
    )
    if dlog is not None and decay_log.ndim == 1:
        dlog = dlog.sum((0, 2))
    return dq, dk, dv, dlog, dinitial_state
