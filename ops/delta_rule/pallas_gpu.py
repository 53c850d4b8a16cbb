"""The (gated) delta rule on NVIDIA GPUs: chunks in order where states pass, all chunks at once where they need not.

With S the state at the start of a chunk and the products of decays of `pallas_gpu_decay.py` (W_ij of tokens j+1 .. i;
r_i = scale prefix_i):

    P_ij = scale W_ij q_i.k_j  (i >= j)      A_ij = beta_i W_ij k_i.k_j  (i > j)      M = (I + A)^-1
    U = M (beta . V)                         X = M (beta . prefix . K)
    N = U - X S                              O = r (Q S) + P N                        S' = total S + K^T (suffix . N)

N are the corrected values that the chunk's tokens write (Yang et al., 2024, arXiv 2406.06484, section 3, with decays).
P, U and X do not depend on the state: a first kernel computes them for all chunks at once, the inverse by substitution
and merging (`pallas_gpu_inverse.py`). A second one walks over the chunks; a program holds some value columns of the
state of one head in registers. With few heads these programs do not fill the chip; then time is cut into parts, each an
affine map of the state: the walk from zero gives what it adds, the walk from the identity without values its matrix,
the states at the starts of the parts follow from these, and the walk proper runs on all parts at once.

Backward, with dS' the gradient of the state at a chunk's end:

    dN = P^T dO + suffix . (K dS')           dS = total dS' + Q^T (r dO) - X^T dN

The first kernel again, the walk that keeps S and N, a walk back that keeps dS' and dN (its parts have the transposed
matrices); then one kernel takes all chunks at once:

    D = M^T dN       dP = dO N^T       dA = -D N^T (i > j)       dV = beta . D       dK0 = -beta . (D S^T)
    dbeta = (D . V - (prefix . K) . (D S^T)) 1 + (dA . KK) 1,    KK_ij = W_ij k_i.k_j

and the rest follows as in gated linear attention, KK being one more product of keys and keys. dM never appears: N
solves N + A N = beta . (V - prefix . K S), so D is the gradient of the right side, and dA that of A. Between forward
and backward nothing is kept.

A decay per channel enters before: `channel_scores` writes P, KK, and the queries and keys with their decays to memory.

**Precision.** Float32 inputs enter matmuls in three terms of 8 bits. With bfloat16 inputs M is float32 and enters in
two, as does what it is multiplied with: with equal keys and beta near 2 its rows alternate in sign, and what is left of
their sums is less than the rounding of M to 8 bits. U, X, N and dN are rounded to the dtype of matmuls, as states are
where they enter one: equal keys reflected at every token leave errors of 2 to 5 parts in a hundred in bfloat16, 1e-5 in
float32.

Tile sizes and numbers of warps are chosen by the registers that the compiler reports, not by time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import pallas_gpu as gpu
from ..chunking import einsum, flip
from ..gated_linear_attention.pallas_gpu import Chunk, Inputs, Sizes
from ..pallas_gpu_decay import (
    ChannelDecay,
    channel_scores,
    channel_scores_adjoint,
    segment_numbers,
    token_log_gradient,
)
from ..pallas_gpu_inverse import FineMatmul, unit_lower_inverse

MAX_KEY = 256  # states of more key channels do not fit registers
SUPPORTED = (
    f"float32 or bfloat16, K up to {MAX_KEY}, and arrays of fewer than 2**31 elements"
)


def supports(q, k, v, beta, decay_log, initial_state, segment_ids, *_, scale) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del k, beta, decay_log, initial_state, segment_ids, scale
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    chunk = _chunk(length, key)
    of_tokens = (length + chunk) * max(key, value, chunk)
    of_states = pl.cdiv(length, chunk) * key * value
    return (
        gpu.available()
        and key <= MAX_KEY
        and batch * heads * max(of_tokens, of_states) < gpu.MAX_ELEMENTS
        and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in (q, v))
    )


def _chunk(length: int, key: int) -> int:
    return min(64 if key <= 128 else 32, gpu.tile_size(length))


def _divided(size: int, most: int) -> tuple[int, int]:
    """The width of a tile, at most `most`, and how many cover `size`."""
    width = min(gpu.tile_size(size), most)
    return width, pl.cdiv(size, width)


class _Given(NamedTuple):
    """What a call is about: arrays, or refs inside kernels.

    of_reads: queries and keys, as the kernels of gated linear attention read them; v [B, T, H, V]; beta [B, T, H]. With
    a decay per channel also KK [B, H, GC, C] and prefix . K [B, H, GC, K].
    """

    of_reads: Inputs
    v: Any
    beta: Any
    key_scores: Any = None
    key_start: Any = None


class _Writes(NamedTuple):
    """What the first kernel computes: P without `Sizes.scale` [B, H, GC, C], X and U [B, H, GC, K or V], in the dtype
    of matmuls, and where asked for M [B, H, GC, C] in float32."""

    scores: Any
    X: Any
    U: Any
    M: Any = None


def _given(q, k, v, beta, decay_log, segment_ids, scale) -> tuple[Sizes, _Given]:
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    chunk, dtype = _chunk(length, key), gpu.matmul_dtype(q, k, v)
    numbers = segment_numbers(segment_ids)
    if decay_log is None or decay_log.ndim < 4:
        sizes = Sizes(batch, length, heads, key, value, chunk, dtype, scale)
        return sizes, _Given(Inputs(q, k, decay_log, numbers), v, beta)
    made = channel_scores(q, k, decay_log, numbers, scale, chunk, dtype, keys=True)
    reads = Inputs(made.q_start, made.k_end, scores=made.scores, total=made.total)
    sizes = Sizes(batch, length, heads, key, value, chunk, dtype, 1.0)
    return sizes, _Given(reads, v, beta, made.key_scores, made.key_start)


def _writes(sizes: Sizes, given: _Given, keep_inverse: bool) -> _Writes:
    """All chunks at once."""
    by_channel = given.key_scores is not None
    width, tiles = _divided(sizes.value, 64)

    def kernel(given, out, *, compiled):
        matmul = _matmul(sizes, compiled)
        fine = FineMatmul(sizes.dtype, compiled)
        b, h, t = sizes.place()
        chunk = Chunk(sizes, given.of_reads, matmul, b, h, t)
        keys, rows, square = sizes.keys, sizes.padded(t), _square(sizes)
        beta = gpu.load(given.beta, b, sizes.tokens(t), h).astype(jnp.float32)
        if by_channel:
            KK = gpu.load(given.key_scores, b, h, rows, square)
            M = unit_lower_inverse(fine, beta[:, None] * KK)
            before = M * beta[None, :]
            k = gpu.load(given.key_start, b, h, rows, keys)
        else:
            row, column = gpu.indices(sizes.chunk, sizes.chunk)
            q, k = (chunk.keys(x, keys) for x in (given.of_reads.q, given.of_reads.k))
            decay = chunk.decay()
            P = decay.weights * matmul.nt(q, k)
            gpu.store(out.scores, P, b, h, rows, square)
            KK = jnp.where(row > column, decay.weights * matmul.nt(k, k), 0.0)
            M = unit_lower_inverse(fine, beta[:, None] * KK)
            start = beta if decay.prefix is None else beta * decay.prefix
            before = M * start[None, :]
        if keep_inverse:
            gpu.store(out.M, M, b, h, rows, square)
        gpu.store(out.X, fine.nn(before, k), b, h, rows, keys)
        M *= beta[None, :]

        def of_values(n: Any, _: Any) -> None:
            values = sizes.values(n, width)
            v = chunk.values(given.v, values)
            gpu.store(out.U, fine.nn(M, v), b, h, rows, values)

        lax.fori_loop(0, tiles, of_values, None)

    def like(size: int, dtype: Any = sizes.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.batch, sizes.heads, sizes.rows, size), dtype)

    (writes,) = gpu.call(
        "delta_writes",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        (given,),
        [
            _Writes(
                None if by_channel else like(sizes.chunk),
                like(sizes.key),
                like(sizes.value),
                like(sizes.chunk, jnp.float32) if keep_inverse else None,
            )
        ],
        warps=4 if sizes.dtype == jnp.bfloat16 else 8,
    )
    if by_channel:
        return writes._replace(scores=given.of_reads.scores)
    return writes


def _matmul(sizes: Sizes, compiled: bool) -> gpu.Matmul:
    """TF32 products of these tiles would spill registers."""
    wide = sizes.dtype == jnp.float32
    return (FineMatmul if wide else gpu.Matmul)(sizes.dtype, compiled)


def _square(sizes: Sizes) -> gpu.Span:
    return gpu.span(0, sizes.chunk, sizes.chunk, True)


# --- Walks over the chunks --------------------------------------------------------------------------------------------


class _Walked(NamedTuple):
    """ends: the states that leave the parts [B, parts, H, K, V]. Where asked for: o [B, T, H, V]; boundary, the states
    that enter the chunks [B, H, G, K, V] (walking back: those at their ends); inside [B, H, GC, V], N or dN."""

    ends: Any
    o: Any = None
    boundary: Any = None
    inside: Any = None


def _walk(
    sizes: Sizes,
    given: _Given,
    writes: _Writes,
    starts: jax.Array,
    read: bool = False,
    keep: bool = False,
) -> _Walked:
    """Passes states over the chunks of each part; starts [B, parts, H, K, V], writes.U None for no values."""
    columns, parts = starts.shape[-1], starts.shape[1]
    width, tiles = _divided(columns, _state_width(sizes))

    def kernel(inputs, writes, starts, out, *, compiled):
        matmul = _matmul(sizes, compiled)
        b, h, n, part = _place(sizes, tiles)
        keys, values = sizes.keys, sizes.channels(n, width, columns)

        def step(t: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, inputs, matmul, b, h, t)
            rows, decay = sizes.padded(t), chunk.decay()
            X = gpu.load(writes.X, b, h, rows, keys)
            N = -matmul.nn(X, S)
            if writes.U is not None:
                N += gpu.load(writes.U, b, h, rows, values).astype(jnp.float32)
            if keep:
                gpu.store(out.boundary, S, b, h, t, keys, values)
                gpu.store(out.inside, N, b, h, rows, values)
            if read:
                P = gpu.load(writes.scores, b, h, rows, _square(sizes))
                o = decay.read(matmul.nn(chunk.keys(inputs.q, keys), S))
                o = sizes.scale * (o + matmul.nn(P, N))
                gpu.store(out.o, o, b, sizes.tokens(t), h, values)
            k = chunk.keys(inputs.k, keys)
            return chunk.keep(decay, S, keys) + matmul.tn(k, decay.write(N))

        S = gpu.load(starts, b, part, h, keys, values)
        S = lax.fori_loop(*_chunks_of(sizes, part, parts), step, S)
        gpu.store(out.ends, S, b, part, h, keys, values)

    ends, boundary, inside = _walked_shapes(sizes, starts)
    o = jax.ShapeDtypeStruct(given.v.shape, given.v.dtype)
    (walked,) = gpu.call(
        "delta_forward" if read else "delta_states",
        kernel,
        (tiles * parts, sizes.batch * sizes.heads),
        (given.of_reads, writes, starts),
        [
            _Walked(
                ends,
                o if read else None,
                boundary if keep else None,
                inside if keep else None,
            )
        ],
        warps=4 if sizes.key <= 128 else 8,
    )
    return walked


def _walk_back(
    sizes: Sizes,
    given: _Given,
    writes: _Writes,
    do: jax.Array,
    starts: jax.Array,
    keep: bool,
) -> _Walked:
    """Passes gradients of states over the chunks of each part, from the last to the first; starts as in `_walk`."""
    parts = starts.shape[1]
    width, tiles = _divided(sizes.value, _state_width(sizes))

    def kernel(inputs, writes, do, starts, out, *, compiled):
        matmul = _matmul(sizes, compiled)
        b, h, n, part = _place(sizes, tiles)
        keys, values = sizes.keys, sizes.values(n, width)
        first, end = _chunks_of(sizes, part, parts)

        def step(i: Any, dS: jax.Array) -> jax.Array:
            t = end - 1 - i
            chunk = Chunk(sizes, inputs, matmul, b, h, t)
            rows, decay = sizes.padded(t), chunk.decay()
            do_ = chunk.values(do, values)
            P = gpu.load(writes.scores, b, h, rows, _square(sizes))
            dN = decay.write(matmul.nn(chunk.keys(inputs.k, keys), dS))
            dN += sizes.scale * matmul.tn(P, do_)
            if keep:
                gpu.store(out.boundary, dS, b, h, t, keys, values)
                gpu.store(out.inside, dN, b, h, rows, values)
            X = gpu.load(writes.X, b, h, rows, keys)
            read = sizes.scale * decay.read(do_.astype(jnp.float32))
            added = matmul.tn(chunk.keys(inputs.q, keys), read) - matmul.tn(X, dN)
            return chunk.keep(decay, dS, keys) + added

        dS = gpu.load(starts, b, part, h, keys, values)
        dS = lax.fori_loop(0, end - first, step, dS)
        gpu.store(out.ends, dS, b, part, h, keys, values)

    ends, boundary, inside = _walked_shapes(sizes, starts)
    (walked,) = gpu.call(
        "delta_gradient_states",
        kernel,
        (tiles * parts, sizes.batch * sizes.heads),
        (given.of_reads, writes, do, starts),
        [
            _Walked(
                ends,
                boundary=boundary if keep else None,
                inside=inside if keep else None,
            )
        ],
        warps=4 if sizes.key <= 128 else 8,
    )
    return walked


def _state_width(sizes: Sizes) -> int:
    """Columns of the state that a program holds while it also multiplies."""
    in_registers = 8192 if sizes.dtype == jnp.bfloat16 else 4096
    return min(64, max(gpu.MIN_TILE, in_registers // sizes.keys.size))


def _place(sizes: Sizes, tiles: int) -> tuple[Any, Any, Any, Any]:
    """Batch, head, tile and part of a program of a grid (tiles parts, B H)."""
    b, h, x = sizes.place()
    return b, h, x % tiles, x // tiles


def _chunks_of(sizes: Sizes, part: Any, parts: int) -> tuple[Any, Any]:
    """The first chunk of a part, and the first behind it."""
    per_part = pl.cdiv(sizes.chunks, parts)
    return part * per_part, jnp.minimum((part + 1) * per_part, sizes.chunks)


def _walked_shapes(sizes: Sizes, starts: jax.Array) -> list[jax.ShapeDtypeStruct]:
    of_head, of_state = (sizes.batch, sizes.heads), starts.shape[3:]
    return [
        jax.ShapeDtypeStruct(starts.shape, jnp.float32),
        jax.ShapeDtypeStruct((*of_head, sizes.chunks, *of_state), sizes.dtype),
        jax.ShapeDtypeStruct((*of_head, sizes.rows, of_state[-1]), sizes.dtype),
    ]


# --- Parts of time ----------------------------------------------------------------------------------------------------


def _parts(sizes: Sizes) -> int:
    tiles = _divided(sizes.value, _state_width(sizes))[1]
    return gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tiles)


def _part_matrices(
    sizes: Sizes, given: _Given, writes: _Writes, parts: int
) -> jax.Array | None:
    """[B, parts, H, K, K]: what a part makes of the state that enters it, without values."""
    if parts == 1:
        return None
    shape = sizes.batch, parts, sizes.heads, sizes.key, sizes.key
    identity = jnp.broadcast_to(jnp.eye(sizes.key, dtype=jnp.float32), shape)
    return _walk(sizes, given, writes._replace(U=None), identity).ends


def _part_starts(
    entering: jax.Array, matrices: jax.Array | None, added: Any, reverse: bool
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V]; entering: the first (reverse: the last).

    added: a function from zero states like the result to those at the parts' ends, where there are several.
    """
    entering = entering.astype(jnp.float32)
    if matrices is None:
        return entering[:, None]
    zeros = jnp.zeros((*matrices.shape[:4], entering.shape[-1]), jnp.float32)

    def step(S: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        matrix, added = part
        return einsum("bhkc,bhcv->bhkv", matrix, S) + added, S

    by_part = flip(matrices) if reverse else matrices, added(zeros)
    by_part = tuple(jnp.moveaxis(x, 1, 0) for x in by_part)
    _, starts = lax.scan(step, entering, by_part, reverse=reverse)
    return jnp.moveaxis(starts, 0, 1)


# --- Rules ------------------------------------------------------------------------------------------------------------


def forward(q, k, v, beta, decay_log, initial_state, segment_ids, *, scale):
    """Shapes as in `api.py`; returns o in v's dtype and the final state in float32."""
    sizes, given = _given(q, k, v, beta, decay_log, segment_ids, scale)
    writes = _writes(sizes, given, keep_inverse=False)
    matrices = _part_matrices(sizes, given, writes, _parts(sizes))
    starts = _part_starts(
        initial_state,
        matrices,
        lambda zeros: _walk(sizes, given, writes, zeros).ends,
        reverse=False,
    )
    walked = _walk(sizes, given, writes, starts, read=True)
    return walked.o, walked.ends[:, -1]


def backward(
    q, k, v, beta, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale
):
    """Cotangents of q, k, v, beta, decay_log and initial_state."""
    sizes, given = _given(q, k, v, beta, decay_log, segment_ids, scale)
    writes = _writes(sizes, given, keep_inverse=True)
    matrices = _part_matrices(sizes, given, writes, _parts(sizes))
    starts = _part_starts(
        initial_state,
        matrices,
        lambda zeros: _walk(sizes, given, writes, zeros).ends,
        reverse=False,
    )
    states = _walk(sizes, given, writes, starts, keep=True)
    starts = _part_starts(
        dfinal_state,
        matrices,
        lambda zeros: _walk_back(sizes, given, writes, do, zeros, keep=False).ends,
        reverse=True,
    )
    dstates = _walk_back(sizes, given, writes, do, starts, keep=True)
    made = _chunk_gradients(sizes, given, writes, q, k, decay_log, do, states, dstates)
    dq, dk, dlog = made.dq, made.dk, made.dlog
    if made.by_channel is not None:
        dq, dk, dlog = channel_scores_adjoint(
            q,
            k,
            decay_log,
            segment_numbers(segment_ids),
            made.by_channel,
            scale,
            sizes.chunk,
            sizes.dtype,
            (*_key_dtypes(q, k, sizes), decay_log.dtype),
        )
    dq, dk = (
        x.reshape(*q.shape[:3], -1, sizes.key).sum(3) if x.shape != q.shape else x
        for x in (dq, dk)
    )
    if decay_log is not None and decay_log.ndim == 1:
        dlog = dlog.sum((0, 2))
    return dq, dk, made.dv, made.dbeta, dlog, dstates.ends[:, 0]


def _key_dtypes(q: jax.Array, k: jax.Array, sizes: Sizes) -> tuple[Any, Any]:
    """Of gradients per value head: float32 where several are still to be added up."""
    alone = q.shape[2] == sizes.heads
    return tuple(x.dtype if alone else jnp.dtype(jnp.float32) for x in (q, k))  # pyright: ignore


class _Gradients(NamedTuple):
    """dq, dk [B, T, H, K] and dlog [B, T, H] or, of a constant, [B, H, G]; or, with a decay per channel, by_channel."""

    dv: Any
    dbeta: Any
    dq: Any = None
    dk: Any = None
    dlog: Any = None
    by_channel: Any = None


def _gradient_shapes(
    sizes: Sizes, given: _Given, q: jax.Array, k: jax.Array, log: jax.Array | None
) -> _Gradients:
    of_head = sizes.batch, sizes.heads
    shape = jax.ShapeDtypeStruct
    dv, dbeta = (shape(x.shape, x.dtype) for x in (given.v, given.beta))
    if given.key_scores is not None:
        scores, keys = (
            shape((*of_head, sizes.rows, size), sizes.dtype)
            for size in (sizes.chunk, sizes.key)
        )
        total = shape((*of_head, sizes.chunks, sizes.key), jnp.float32)
        by_channel = ChannelDecay(scores, keys, keys, total, scores, keys)
        return _Gradients(dv, dbeta, by_channel=by_channel)
    size = sizes.batch, sizes.length, sizes.heads, sizes.key
    dq, dk = (shape(size, dtype) for dtype in _key_dtypes(q, k, sizes))
    if log is None:
        return _Gradients(dv, dbeta, dq, dk)
    constant = shape((*of_head, sizes.chunks), jnp.float32)
    dlog = constant if log.ndim == 1 else shape(log.shape, log.dtype)
    return _Gradients(dv, dbeta, dq, dk, dlog)


def _chunk_gradients(
    sizes: Sizes,
    given: _Given,
    writes: _Writes,
    q: jax.Array,
    k: jax.Array,
    log: jax.Array | None,
    do: jax.Array,
    states: _Walked,
    dstates: _Walked,
) -> _Gradients:
    """All chunks at once, from what the walks kept."""
    most = 64 if sizes.dtype == jnp.bfloat16 else 32
    (of_key, key_tiles), (width, tiles) = (
        _divided(size, most) for size in (sizes.key, sizes.value)
    )
    constant = log is not None and log.ndim == 1
    C = sizes.chunk

    def kernel(given, writes, do, states, dstates, out, *, compiled):
        matmul = _matmul(sizes, compiled)
        fine = FineMatmul(sizes.dtype, compiled)
        b, h, t = sizes.place()
        inputs = given.of_reads
        chunk = Chunk(sizes, inputs, matmul, b, h, t)
        tokens, rows, square = sizes.tokens(t), sizes.padded(t), _square(sizes)
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
            KK = lax.fori_loop(0, key_tiles, of_keys, _zeros(C, C)) * decay.weights
            KK = jnp.where(row > column, KK, 0.0)
        sums = _zeros(C, C), _zeros(C, C), _zeros(C)
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
                S, dS = (
                    gpu.load(x.boundary, b, h, t, keys, values)
                    for x in (states, dstates)
                )
                dtotal += (S.astype(jnp.float32) * dS.astype(jnp.float32)).sum(1)
                dq, DS = dq + matmul.nt(do_, S), DS + matmul.nt(D, S)
                return dq, DS, dk_end + matmul.nt(N, dS), dtotal

            sums = *(_zeros(C, of_key),) * 3, _zeros(of_key)
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

        of_factors = dbeta, _zeros(C), _zeros(C), jnp.float32(0)
        dbeta, of_prefix, of_suffix, of_total = lax.fori_loop(
            0, key_tiles, of_key_tile, of_factors
        )
        gpu.store(out.dbeta, dbeta, b, tokens, h)
        if out.dlog is None:
            return
        dlog = token_log_gradient(
            of_weights, of_prefix, of_suffix, decay.total * of_total, matmul
        )
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
    )
    return gradients


def _zeros(*sizes: int) -> jax.Array:
    return jnp.zeros(sizes, jnp.float32)
