"""The delta rule on GPU: the kernel that computes what the tokens of each chunk write, and the
kernels that walk over chunks (`__init__.py` has the equations)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, ChunkInputs, Sizes
from ...gpu.inverse import unit_lower_inverse


class KernelInputs(NamedTuple):
    """q, k, v, beta and the decays as arrays, or as refs inside a kernel."""

    chunks: ChunkInputs
    v: Any  # [B, T, H, V]
    beta: Any  # [B, T, H]
    # With a decay for each channel (`ops/gpu/channel_decay.py`):
    key_scores: Any = None  # KK [B, H, G C, C]
    k_start: Any = None  # prefix . K [B, H, G C, K]


class Writes(NamedTuple):
    """What the writes of a chunk are made of, without the state; in the dtype of matmuls."""

    scores: Any  # P [B, H, G C, C]
    X: Any  # [B, H, G C, K]
    U: Any  # [B, H, G C, V]; None where values are zero
    M: Any = None  # [B, H, G C, C] float32; None unless asked for


# --- The writes of all chunks


def compute_writes(sizes: Sizes, inputs: KernelInputs, keep_inverse: bool) -> Writes:
    """P, X and U of all chunks; keep_inverse: M too."""
    has_channel_decay = inputs.key_scores is not None
    # All key channels at once in bfloat16. In float32, where one product is six of three terms
    # each, such tiles would not fit registers.
    wide = sizes.dtype == jnp.bfloat16
    key_width, key_tiles = gpu.tiling(sizes.key, sizes.keys.size if wide else 16)
    value_width, value_tiles = gpu.tiling(sizes.value, 64 if wide else 32)

    def products(chunk: Chunk, load_x: Any, load_y: Any) -> jax.Array:
        """X Y^T [C, C]; load_x, load_y: `chunk.queries` or `chunk.keys`."""

        def add_keys(n: Any, total: jax.Array) -> jax.Array:
            keys = sizes.channels(n, key_width, sizes.key)
            return total + chunk.matmul.nt(load_x(keys), load_y(keys))

        return lax.fori_loop(0, key_tiles, add_keys, gpu.zeros(sizes.chunk, sizes.chunk))

    def kernel(refs: KernelInputs, out: Writes) -> None:
        fine = gpu.Matmul(sizes.dtype, fine=True)
        chunk = Chunk(sizes, refs.chunks, gpu.Matmul(sizes.dtype), *sizes.program())
        b, h, t = chunk.b, chunk.h, chunk.t
        rows, columns = sizes.padded(t), sizes.columns
        beta = gpu.load(refs.beta, b, sizes.tokens(t), h).astype(jnp.float32)  # [C]
        if has_channel_decay:
            KK = chunk.padded(refs.key_scores, columns)  # [C, C]
            M = unit_lower_inverse(fine, beta[:, None] * KK)  # [C, C]  Eq. 2
            M_X = M * beta[None, :]  # [C, C]
        else:
            row, column = gpu.indices(sizes.chunk, sizes.chunk)
            decay = chunk.decay()
            P = decay.weights * products(chunk, chunk.queries, chunk.keys)  # [C, C]  Eq. 1
            gpu.store(out.scores, P, b, h, rows, columns)
            KK = decay.weights * products(chunk, chunk.keys, chunk.keys)  # [C, C]
            KK = jnp.where(row > column, KK, 0.0)  # Eq. 1
            M = unit_lower_inverse(fine, beta[:, None] * KK)  # [C, C]  Eq. 2
            start = beta if decay.prefix is None else beta * decay.prefix  # [C]
            M_X = M * start[None, :]  # [C, C]
        if keep_inverse:
            gpu.store(out.M, M, b, h, rows, columns)

        def write_keys(n: Any, _: Any) -> None:
            keys = sizes.channels(n, key_width, sizes.key)
            # [C, K]
            k = chunk.padded(refs.k_start, keys) if has_channel_decay else chunk.keys(keys)
            gpu.store(out.X, fine.nn(M_X, k), b, h, rows, keys)  # Eq. 4

        lax.fori_loop(0, key_tiles, write_keys, None)
        M_U = M * beta[None, :]  # [C, C]

        def write_values(n: Any, _: Any) -> None:
            values = sizes.values(n, value_width)
            v = chunk.values(refs.v, values)  # [C, V]
            gpu.store(out.U, fine.nn(M_U, v), b, h, rows, values)  # Eq. 3

        lax.fori_loop(0, value_tiles, write_values, None)

    writes = gpu.call(
        "delta_writes",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        inputs,
        Writes(
            None if has_channel_decay else sizes.rows_shape(sizes.chunk, sizes.dtype),
            X=sizes.rows_shape(sizes.key, sizes.dtype),
            U=sizes.rows_shape(sizes.value, sizes.dtype),
            M=sizes.rows_shape(sizes.chunk, jnp.float32) if keep_inverse else None,
        ),
        warps=sizes.warps,
        interpret=sizes.interpret,
    )
    return writes._replace(scores=inputs.chunks.scores) if has_channel_decay else writes


# --- Walks over the chunks


class WalkInputs(NamedTuple):
    chunks: ChunkInputs
    writes: Writes
    do: Any  # [B, T, H, V]; None forward
    starts: Any  # [B, parts, H, K, V], the states (back: gradients) that enter the parts


class WalkOutputs(NamedTuple):
    """S and N forward; dS' and dN back. None unless asked for."""

    ends: Any  # [B, parts, H, K, V], the states (back: gradients) that leave the parts
    o: Any = None  # [B, T, H, V]
    S: Any = None  # [B, H, G, K, V]
    N: Any = None  # [B, H, G C, V]


def walk(
    sizes: Sizes, inputs: WalkInputs, *, o: jax.ShapeDtypeStruct | None = None, keep: bool = False
) -> WalkOutputs:
    """The states at the ends of parts; with the shape `o` also the outputs, with `keep` S and N."""
    size, parts = inputs.starts.shape[-1], inputs.starts.shape[1]
    width, tile_count = gpu.tiling(size, sizes.state_width)

    def kernel(refs: WalkInputs, out: WalkOutputs) -> None:
        matmul, writes = gpu.Matmul(sizes.dtype), refs.writes
        b, h, x = sizes.program()
        n, part = x % tile_count, x // tile_count
        keys, values = sizes.keys, sizes.channels(n, width, size)

        def step(t: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, refs.chunks, matmul, b, h, t)
            rows, decay = sizes.padded(t), chunk.decay()
            X = gpu.load(writes.X, b, h, rows, keys)  # [C, K]
            N = -matmul.nn(X, S)  # [C, V]  Eq. 5
            if writes.U is not None:
                N += gpu.load(writes.U, b, h, rows, values).astype(jnp.float32)
            if keep:
                gpu.store(out.S, S, b, h, t, keys, values)
                gpu.store(out.N, N, b, h, rows, values)
            if o is not None:
                P = gpu.load(writes.scores, b, h, rows, sizes.columns)  # [C, C]
                reads = decay.times_prefix(matmul.nn(chunk.queries(keys), S))  # [C, V]
                reads = sizes.scale * (reads + matmul.nn(P, N))  # Eq. 6
                gpu.store(out.o, reads, b, sizes.tokens(t), h, values)
            k = chunk.keys(keys)  # [C, K]
            # NOTE: total is loaded before the matmul; after it, it would cost registers.
            kept = chunk.times_total(decay, S, keys)  # [K, V]
            return kept + matmul.tn(k, decay.times_suffix(N))  # Eq. 7

        S = gpu.load(refs.starts, b, part, h, keys, values)  # [K, V]
        S = lax.fori_loop(*sizes.part_chunks(part, parts), step, S)
        gpu.store(out.ends, S, b, part, h, keys, values)

    outputs = _output_shapes(sizes, inputs.starts, keep)
    return gpu.call(
        "delta_states" if o is None else "delta_forward",
        kernel,
        (tile_count * parts, sizes.batch * sizes.heads),
        inputs,
        outputs._replace(o=o),
        warps=4 if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )


def walk_back(sizes: Sizes, inputs: WalkInputs, *, keep: bool = False) -> WalkOutputs:
    """The gradients of states, from the last chunk of each part to the first; with `keep` dS' and
    dN."""
    parts = inputs.starts.shape[1]
    width, tile_count = gpu.tiling(sizes.value, sizes.state_width)

    def kernel(refs: WalkInputs, out: WalkOutputs) -> None:
        matmul, writes = gpu.Matmul(sizes.dtype), refs.writes
        b, h, x = sizes.program()
        n, part = x % tile_count, x // tile_count
        keys, values = sizes.keys, sizes.values(n, width)
        first, end = sizes.part_chunks(part, parts)

        def step(i: Any, dS: jax.Array) -> jax.Array:
            t = end - 1 - i
            chunk = Chunk(sizes, refs.chunks, matmul, b, h, t)
            rows, decay = sizes.padded(t), chunk.decay()
            do = chunk.values(refs.do, values)  # [C, V]
            P = gpu.load(writes.scores, b, h, rows, sizes.columns)  # [C, C]
            dN = decay.times_suffix(matmul.nn(chunk.keys(keys), dS))  # [C, V]
            dN += sizes.scale * matmul.tn(P, do)  # Eq. 8
            if keep:
                gpu.store(out.S, dS, b, h, t, keys, values)
                gpu.store(out.N, dN, b, h, rows, values)
            X = gpu.load(writes.X, b, h, rows, keys)  # [C, K]
            do = sizes.scale * decay.times_prefix(do.astype(jnp.float32))
            added = matmul.tn(chunk.queries(keys), do) - matmul.tn(X, dN)  # [K, V]
            return chunk.times_total(decay, dS, keys) + added  # Eq. 9

        dS = gpu.load(refs.starts, b, part, h, keys, values)  # [K, V]
        dS = lax.fori_loop(0, end - first, step, dS)
        gpu.store(out.ends, dS, b, part, h, keys, values)

    return gpu.call(
        "delta_gradient_states",
        kernel,
        (tile_count * parts, sizes.batch * sizes.heads),
        inputs,
        _output_shapes(sizes, inputs.starts, keep),
        warps=4 if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )


def _output_shapes(sizes: Sizes, starts: jax.Array, keep: bool) -> WalkOutputs:
    key, value = starts.shape[3:]
    return WalkOutputs(
        jax.ShapeDtypeStruct(starts.shape, jnp.float32),
        S=sizes.chunks_shape(key, value, dtype=sizes.dtype) if keep else None,
        N=sizes.rows_shape(value, sizes.dtype) if keep else None,
    )
