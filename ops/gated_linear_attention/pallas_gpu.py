"""Gated linear attention on NVIDIA GPUs: chunks in order where states pass, all chunks at once where they need not.

With P the scores of a chunk with their decays and `scale`, r_i = scale prefix_i and w_j = suffix_j
(`pallas_gpu_decay.py`):

    O  = r (Q S) + P V          S' = total S + K^T (w V)

Forward is one kernel: a program holds the state of one head and some of its value channels in registers and walks over
the chunks. With few heads these programs do not fill the chip; then time is cut into parts, a first kernel computes
what each part adds to the state and how it decays it, the states at the starts of the parts follow from these, and the
second kernel runs on all parts at once.

Backward, with dS' the gradient of the state at a chunk's end:

    dS = total dS' + Q^T (r dO)      dP = dO V^T                    dV = w (K dS') + P^T dO
    dQ = r (dO S^T) + (dP W) K       dK = w (V dS'^T) + (dP W)^T Q

Two kernels walk over the chunks and write the states S and the gradients dS' at chunk boundaries, rounded to the dtype
of the matmuls that read them; then one kernel takes all chunks at once. Between forward and backward nothing is kept.

A decay per channel enters before: `channel_scores` writes P, Q with r and K with w to memory, and the kernels here read
them in the place of q and k.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import pallas_gpu as gpu
from ..pallas_gpu_decay import (
    ChannelDecay,
    TokenDecay,
    channel_scores,
    channel_scores_adjoint,
    load_segments,
    segment_numbers,
    token_decay,
    token_log_gradient,
)

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


def chunk_length(length: int) -> int:
    """C: 64, the rows of Hopper's matmuls, or fewer where there are not as many tokens."""
    return min(64, gpu.tile_size(length))


def _divided(size: int, most: int) -> tuple[int, int]:
    """The width of a tile, at most `most`, and how many cover `size`."""
    width = min(gpu.tile_size(size), most)
    return width, pl.cdiv(size, width)


@dataclass(frozen=True)
class Sizes:
    """What is static in a call; chunk: C; dtype: of matmuls; scale: what scores and reads still lack."""

    batch: int
    length: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: Any
    scale: float

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def rows(self) -> int:
        """T padded to whole chunks."""
        return self.chunks * self.chunk

    @property
    def warps(self) -> int:
        """Of a program with tiles of 64 x 64; three products for one take twice the registers."""
        return 4 if self.dtype == jnp.bfloat16 else 8

    @property
    def keys(self) -> gpu.Span:
        """All key channels."""
        return self.channels(0, gpu.tile_size(self.key), self.key)

    def channels(self, n: Any, width: int, size: int) -> gpu.Span:
        """The n-th tile of `size` channels."""
        return gpu.span(n * width, width, size, size % width == 0)

    def values(self, n: Any, width: int) -> gpu.Span:
        return self.channels(n, width, self.value)

    def tokens(self, t: Any) -> gpu.Span:
        whole = self.length % self.chunk == 0
        return gpu.span(t * self.chunk, self.chunk, self.length, whole)

    def padded(self, t: Any) -> gpu.Span:
        """The same rows of an array that is padded to whole chunks."""
        return gpu.span(t * self.chunk, self.chunk, self.rows, True)

    def place(self) -> tuple[Any, Any, Any]:
        """Batch and head of a program of a grid (anything, B H), and its first coordinate."""
        x, at = pl.program_id(0), pl.program_id(1)
        return at // self.heads, at % self.heads, x


class Inputs(NamedTuple):
    """What the kernels read besides values: arrays, or refs inside.

    With a decay per channel q, k, scores and total are those of `channel_scores`, log and numbers None. Otherwise
    scores and total are None: q, k [B, T, HK, K], log None, [H] or [B, T, H], numbers None or [B, T].
    """

    q: Any
    k: Any
    log: Any = None
    numbers: Any = None
    scores: Any = None
    total: Any = None


def _inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
) -> tuple[Sizes, Inputs]:
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    dtype = gpu.matmul_dtype(q, k, v)
    chunk = chunk_length(length)
    numbers = segment_numbers(segment_ids)
    if decay_log is None or decay_log.ndim < 4:
        sizes = Sizes(batch, length, heads, key, value, chunk, dtype, scale)
        return sizes, Inputs(q, k, decay_log, numbers)
    made = channel_scores(q, k, decay_log, numbers, scale, chunk, dtype)
    sizes = Sizes(batch, length, heads, key, value, chunk, dtype, 1.0)
    return sizes, Inputs(made.q_start, made.k_end, scores=made.scores, total=made.total)


@dataclass(frozen=True)
class Chunk:
    """Chunk t of batch b and head h, inside a kernel."""

    sizes: Sizes
    inputs: Inputs
    matmul: gpu.Matmul
    b: Any
    h: Any
    t: Any

    def keys(self, ref: Any, columns: gpu.Span) -> jax.Array:
        """[C, columns] of `inputs.q` or `inputs.k`."""
        if self.inputs.scores is not None:
            return gpu.load(ref, self.b, self.h, self.sizes.padded(self.t), columns)
        group = self.sizes.heads // ref.shape[2]
        rows = self.sizes.tokens(self.t)
        return gpu.load(ref, self.b, rows, self.h // group, columns)

    def values(self, ref: Any, columns: gpu.Span) -> jax.Array:
        """[C, columns] of v or do."""
        return gpu.load(ref, self.b, self.sizes.tokens(self.t), self.h, columns)

    def log(self) -> jax.Array | None:
        """[C] float32, zero where no token is; None: no decay."""
        ref, sizes = self.inputs.log, self.sizes
        if ref is None:
            return None
        if len(ref.shape) == 3:
            log = gpu.load(ref, self.b, sizes.tokens(self.t), self.h)
            return log.astype(jnp.float32)
        place = self.t * sizes.chunk + lax.iota(jnp.int32, sizes.chunk)
        log = gpu.load(ref, self.h).astype(jnp.float32)
        return jnp.where(place < sizes.length, log, 0.0)

    def decay(self) -> TokenDecay:
        """W, prefix, suffix and total; all ones where `channel_scores` has seen to the decays."""
        sizes = self.sizes
        segments = load_segments(
            self.inputs.numbers, self.b, self.t * sizes.chunk, sizes.chunk, sizes.length
        )
        return token_decay(self.log(), segments, self.matmul, sizes.chunk)

    def keep(self, decay: TokenDecay, state: jax.Array, keys: gpu.Span) -> jax.Array:
        """What is left of `state` [keys, values] after the chunk."""
        if self.inputs.total is None:
            return decay.keep(state)
        total = gpu.load(self.inputs.total, self.b, self.h, self.t, keys)
        return state * total[:, None]

    def scores(self) -> jax.Array:
        """P [C, C] as `channel_scores` left it."""
        rows = self.sizes.padded(self.t)
        columns = gpu.span(0, self.sizes.chunk, self.sizes.chunk, True)
        return gpu.load(self.inputs.scores, self.b, self.h, rows, columns)


# --- Forward ----------------------------------------------------------------------------------------------------------


def forward(q, k, v, decay_log, initial_state, segment_ids, *, scale):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale)
    # The tile of the state that a program holds while it also multiplies.
    in_registers = 8192 if sizes.dtype == jnp.bfloat16 else 4096
    most = max(gpu.MIN_TILE, in_registers // sizes.keys.size)
    width, tiles = _divided(sizes.value, min(64, most))
    parts = gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tiles)
    starts = _part_starts(sizes, inputs, v, initial_state, parts, reverse=False)
    per_part = pl.cdiv(sizes.chunks, parts)

    def kernel(inputs, v, starts, o, final, *, compiled):
        matmul = gpu.Matmul(sizes.dtype, compiled)
        b, h, x = sizes.place()
        n, part = x % tiles, x // tiles
        keys, values = sizes.keys, sizes.values(n, width)

        def step(t: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, inputs, matmul, b, h, t)
            q, k = (chunk.keys(ref, keys) for ref in (inputs.q, inputs.k))
            decay, v_ = chunk.decay(), chunk.values(v, values)
            P = (
                decay.weights * matmul.nt(q, k)
                if inputs.scores is None
                else chunk.scores()
            )
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
        (
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(starts.shape, jnp.float32),
        ),
        warps=sizes.warps if sizes.key <= 128 else 8,
    )
    return o, final[:, -1]


# --- States at the boundaries of chunks -------------------------------------------------------------------------------


def _walk(
    sizes: Sizes,
    inputs: Inputs,
    x: jax.Array,
    starts: jax.Array,
    reverse: bool,
    keep: bool,
) -> list[jax.Array]:
    """Passes states over the chunks of each part: S' = total S + K^T (w x), or reverse dS = total dS' + Q^T (r x).

    x: [B, T, H, V]; starts [B, parts, H, K, V], those that enter the parts. Returns, with `keep`, the states that enter
    each chunk [B, H, G, K, V], and those that leave the parts.
    """
    (of_keys, key_tiles), (width, tiles) = (
        _divided(size, 64) for size in (sizes.key, sizes.value)
    )
    parts = starts.shape[1]
    per_part = pl.cdiv(sizes.chunks, parts)

    def kernel(inputs, x, starts, *outputs, compiled):
        *kept, final = outputs
        matmul = gpu.Matmul(sizes.dtype, compiled)
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
    )


def _boundary_states(
    sizes: Sizes,
    inputs: Inputs,
    parts: int,
    x: jax.Array,
    entering: jax.Array,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """The states that enter each chunk [B, H, G, K, V] and the one that leaves the last (reverse: the first)."""
    starts = _part_starts(sizes, inputs, x, entering, parts, reverse)
    states, final = _walk(sizes, inputs, x, starts, reverse, keep=True)
    return states, final[:, 0 if reverse else -1]


def _part_starts(
    sizes: Sizes,
    inputs: Inputs,
    x: jax.Array,
    entering: jax.Array,
    parts: int,
    reverse: bool,
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V], float32; entering: that of the first (reverse: the last)."""
    entering = entering.astype(jnp.float32)
    if parts == 1:
        return entering[:, None]
    zeros = jnp.zeros((sizes.batch, parts, *entering.shape[1:]), jnp.float32)
    (added,) = _walk(sizes, inputs, x, zeros, reverse, keep=False)
    totals = _part_totals(sizes, inputs, parts)

    def step(S: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        total, added = part
        return total * S + added, S

    by_part = [jnp.moveaxis(part, 1, 0) for part in (totals, added)]
    _, starts = lax.scan(step, entering, tuple(by_part), reverse=reverse)
    return jnp.moveaxis(starts, 0, 1)


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


# --- Backward ---------------------------------------------------------------------------------------------------------


def backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale
):
    """Cotangents of q, k, v, decay_log and initial_state."""
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale)
    programs = math.prod(_divided(size, 64)[1] for size in (sizes.key, sizes.value)) * (
        sizes.batch * sizes.heads
    )
    parts = gpu.split_time(sizes.chunks, programs)
    walk = functools.partial(_boundary_states, sizes, inputs, parts)
    S, _ = walk(v, initial_state, reverse=False)
    dS, dinitial_state = walk(do, dfinal_state, reverse=True)
    of_keys, dv, dlog = _chunk_gradients(sizes, inputs, q, k, v, decay_log, do, S, dS)
    if inputs.scores is not None:
        *of_keys, dlog = channel_scores_adjoint(
            q,
            k,
            decay_log,
            segment_numbers(segment_ids),
            ChannelDecay(*of_keys, total=dlog),
            scale,
            sizes.chunk,
            sizes.dtype,
            (*_key_dtypes(q, k, sizes), decay_log.dtype),
        )
    dq, dk = (
        x.reshape(*q.shape[:3], -1, sizes.key).sum(3) if x.shape != q.shape else x
        for x in of_keys
    )
    if dlog is not None and decay_log.ndim == 1:
        dlog = dlog.sum((0, 2))
    return dq, dk, dv, dlog, dinitial_state


def _key_dtypes(q: jax.Array, k: jax.Array, sizes: Sizes) -> tuple[Any, Any]:
    """Of gradients per value head: float32 where several are still to be added up."""
    alone = q.shape[2] == sizes.heads
    return tuple(x.dtype if alone else jnp.dtype(jnp.float32) for x in (q, k))  # pyright: ignore


def _chunk_gradients(
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
    """All chunks at once, from the states S at their starts and the gradients dS of those at their ends.

    Returns dq, dk [B, T, H, K]; with a decay per channel the cotangents of scores [B, H, GC, C], q_start and k_end
    [B, H, GC, K]. Then dv, and the cotangent of the logs: [B, T, H], [B, H, G] of a constant, of `total` [B, H, G, K].
    """
    by_channel = inputs.scores is not None
    constant = decay_log is not None and decay_log.ndim == 1
    (of_key, key_tiles), (width, tiles) = (
        _divided(size, 64) for size in (sizes.key, sizes.value)
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
        outputs = [shape(size, dtype) for dtype in _key_dtypes(q, k, sizes)]
        if decay_log is None:
            of_log = []
        elif constant:
            of_log = [shape((*of_head, sizes.chunks), jnp.float32)]
        else:
            of_log = [shape(decay_log.shape, decay_log.dtype)]

    def kernel(inputs, v, do, S, dS, *outputs, compiled):
        *of_keys, dv = outputs[: -len(of_log)] if of_log else outputs
        dlog = outputs[-1] if of_log else None
        matmul = gpu.Matmul(sizes.dtype, compiled)
        b, h, t = sizes.place()
        chunk, rows = Chunk(sizes, inputs, matmul, b, h, t), sizes.tokens(t)
        square = gpu.span(0, sizes.chunk, sizes.chunk, True)
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

            dv_ = lax.fori_loop(0, key_tiles, of_state, _zeros(sizes.chunk, width))
            dv_ = decay.write(dv_) + sizes.scale * matmul.tn(P, do_)
            gpu.store(dv, dv_, b, rows, h, values)
            return dP + matmul.nt(do_, v_)

        if by_channel:
            P = chunk.scores()
        else:
            P = lax.fori_loop(0, key_tiles, of_scores, _zeros(*(sizes.chunk,) * 2))
            P *= decay.weights
        dP = lax.fori_loop(0, tiles, of_values, _zeros(*(sizes.chunk,) * 2))
        dP *= sizes.scale
        dscores = decay.weights * dP
        if by_channel:
            gpu.store(of_keys[0], dP, b, h, sizes.padded(t), square)

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

            sums = *(_zeros(sizes.chunk, of_key),) * 2, _zeros(of_key)
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

        of_factors = _zeros(sizes.chunk), _zeros(sizes.chunk), jnp.float32(0)
        of_factors = lax.fori_loop(0, key_tiles, of_key_tile, of_factors)
        if dlog is None or by_channel:
            return
        of_prefix, of_suffix, of_total = of_factors
        gradient = token_log_gradient(
            P * dP, of_prefix, of_suffix, decay.total * of_total, matmul
        )
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
    )
    at = len(outputs)
    return list(results[:at]), results[at], results[at + 1] if of_log else None


def _zeros(*sizes: int) -> jax.Array:
    return jnp.zeros(sizes, jnp.float32)
