"""The delta rule on GPU: what the tokens of each chunk write, and the walks over the chunks
(`pallas_gpu.py`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...framework import segments
from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, Inputs, Sizes
from ...gpu.decay import channel_scores
from ...gpu.inverse import unit_lower_inverse


def chunk_length(length: int, key: int) -> int:
    return min(64 if key <= 128 else 32, gpu.tile_size(length))


class Given(NamedTuple):
    """What a call is about: arrays, or refs inside kernels.

    of_reads: queries and keys, as the kernels of gated linear attention read them; v [B, T, H, V];
    beta [B, T, H]. With a decay per channel also KK [B, H, GC, C] and prefix . K [B, H, GC, K]."""

    of_reads: Inputs
    v: Any
    beta: Any
    key_scores: Any = None
    key_start: Any = None


class Writes(NamedTuple):
    """What the first kernel computes: P without `Sizes.scale` [B, H, GC, C], X and U [B, H, GC, K
    or V], in the dtype of matmuls, and where asked for M [B, H, GC, C] in float32."""

    scores: Any
    X: Any
    U: Any
    M: Any = None


def given_inputs(q, k, v, beta, decay_log, segment_ids, scale, interpret) -> tuple[Sizes, Given]:
    (batch, length, heads, value), key = v.shape, q.shape[-1]
    chunk, dtype = chunk_length(length, key), gpu.matmul_dtype(q, k, v)
    numbers = segments.numbers(segment_ids)
    if decay_log is None or decay_log.ndim < 4:
        sizes = Sizes(batch, length, heads, key, value, chunk, dtype, scale, interpret)
        return sizes, Given(Inputs(q, k, decay_log, numbers), v, beta)
    made = channel_scores(
        q, k, decay_log, numbers, scale, chunk, dtype, keys=True, interpret=interpret
    )
    reads = Inputs(made.q_start, made.k_end, scores=made.scores, total=made.total)
    sizes = Sizes(batch, length, heads, key, value, chunk, dtype, 1.0, interpret)
    return sizes, Given(reads, v, beta, made.key_scores, made.key_start)


def compute_writes(sizes: Sizes, given: Given, keep_inverse: bool) -> Writes:
    """All chunks at once."""
    by_channel = given.key_scores is not None
    # All key channels at once in bfloat16; three terms for one would not fit registers.
    most = (sizes.keys.size, 64) if sizes.dtype == jnp.bfloat16 else (16, 32)
    (of_keys, key_tiles), (width, tiles) = (
        gpu.divided(*x) for x in zip((sizes.key, sizes.value), most, strict=True)
    )

    def kernel(given, out):
        matmul = gpu.Matmul(sizes.dtype)
        fine = gpu.Matmul(sizes.dtype, fine=True)
        b, h, t = sizes.place()
        chunk = Chunk(sizes, given.of_reads, matmul, b, h, t)
        rows, square = sizes.padded(t), sizes.square
        beta = gpu.load(given.beta, b, sizes.tokens(t), h).astype(jnp.float32)

        def key_tile(n: Any) -> gpu.Span:
            return sizes.channels(n, of_keys, sizes.key)

        if by_channel:
            KK = gpu.load(given.key_scores, b, h, rows, square)
            M = unit_lower_inverse(fine, beta[:, None] * KK)
            before = M * beta[None, :]
        else:

            def products(a: Any, b: Any) -> jax.Array:
                def of_tile(n: Any, total: jax.Array) -> jax.Array:
                    x, y = (chunk.keys(ref, key_tile(n)) for ref in (a, b))
                    return total + matmul.nt(x, y)

                zeros = gpu.zeros(sizes.chunk, sizes.chunk)
                return lax.fori_loop(0, key_tiles, of_tile, zeros)

            q, k = given.of_reads.q, given.of_reads.k
            row, column = gpu.indices(sizes.chunk, sizes.chunk)
            decay = chunk.decay()
            gpu.store(out.scores, decay.weights * products(q, k), b, h, rows, square)
            KK = jnp.where(row > column, decay.weights * products(k, k), 0.0)
            M = unit_lower_inverse(fine, beta[:, None] * KK)
            start = beta if decay.prefix is None else beta * decay.prefix
            before = M * start[None, :]
        if keep_inverse:
            gpu.store(out.M, M, b, h, rows, square)

        def of_key_tile(n: Any, _: Any) -> None:
            keys = key_tile(n)
            k = (
                gpu.load(given.key_start, b, h, rows, keys)
                if by_channel
                else chunk.keys(given.of_reads.k, keys)
            )
            gpu.store(out.X, fine.nn(before, k), b, h, rows, keys)

        lax.fori_loop(0, key_tiles, of_key_tile, None)
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
            Writes(
                None if by_channel else like(sizes.chunk),
                like(sizes.key),
                like(sizes.value),
                like(sizes.chunk, jnp.float32) if keep_inverse else None,
            )
        ],
        warps=4 if sizes.dtype == jnp.bfloat16 else 8,
        interpret=sizes.interpret,
    )
    if by_channel:
        return writes._replace(scores=given.of_reads.scores)
    return writes


# --- Walks over the chunks
# --------------------------------------------------------------------------------------------


class Walked(NamedTuple):
    """ends: the states that leave the parts [B, parts, H, K, V]. Where asked for: o [B, T, H, V];
    boundary, the states that enter the chunks [B, H, G, K, V] (walking back: those at their ends);
    inside [B, H, GC, V], N or dN."""

    ends: Any
    o: Any = None
    boundary: Any = None
    inside: Any = None


def walk(
    sizes: Sizes,
    given: Given,
    writes: Writes,
    starts: jax.Array,
    read: bool = False,
    keep: bool = False,
) -> Walked:
    """Passes states over the chunks of each part; starts [B, parts, H, K, V], writes.U None for no
    values."""
    columns, parts = starts.shape[-1], starts.shape[1]
    width, tiles = gpu.divided(columns, state_width(sizes))

    def kernel(inputs, writes, starts, out):
        matmul = gpu.Matmul(sizes.dtype)
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
                P = gpu.load(writes.scores, b, h, rows, sizes.square)
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
        [Walked(ends, o if read else None, boundary if keep else None, inside if keep else None)],
        warps=4 if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )
    return walked


def walk_back(
    sizes: Sizes, given: Given, writes: Writes, do: jax.Array, starts: jax.Array, keep: bool
) -> Walked:
    """Passes gradients of states over the chunks of each part, from the last to the first; starts
    as in `_walk`."""
    parts = starts.shape[1]
    width, tiles = gpu.divided(sizes.value, state_width(sizes))

    def kernel(inputs, writes, do, starts, out):
        matmul = gpu.Matmul(sizes.dtype)
        b, h, n, part = _place(sizes, tiles)
        keys, values = sizes.keys, sizes.values(n, width)
        first, end = _chunks_of(sizes, part, parts)

        def step(i: Any, dS: jax.Array) -> jax.Array:
            t = end - 1 - i
            chunk = Chunk(sizes, inputs, matmul, b, h, t)
            rows, decay = sizes.padded(t), chunk.decay()
            do_ = chunk.values(do, values)
            P = gpu.load(writes.scores, b, h, rows, sizes.square)
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
        [Walked(ends, boundary=boundary if keep else None, inside=inside if keep else None)],
        warps=4 if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )
    return walked


def state_width(sizes: Sizes) -> int:
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
