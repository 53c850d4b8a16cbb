"""Gated linear attention on GPU: the kernels that walk over chunks (`__init__.py` has the
equations)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...gpu import tiles as gpu
from ...gpu.chunks import Chunk, ChunkInputs, Sizes

MAX_WIDTH = 64  # key and value channels of the state that a program of `walk_states` holds


class ForwardInputs(NamedTuple):
    chunks: ChunkInputs
    v: Any  # [B, T, H, V]
    starts: Any  # [B, parts, H, K, V], the states that enter the parts


class ForwardOutputs(NamedTuple):
    o: Any  # [B, T, H, V]
    ends: Any  # [B, parts, H, K, V], the states that leave the parts


def walk(sizes: Sizes, inputs: ForwardInputs) -> ForwardOutputs:
    """The outputs, and the states that leave the parts."""
    parts = inputs.starts.shape[1]
    width, tile_count = gpu.tiling(sizes.value, sizes.state_width)

    def kernel(refs: ForwardInputs, out: ForwardOutputs) -> None:
        matmul = gpu.Matmul(sizes.dtype)
        b, h, x = sizes.program()
        n, part = x % tile_count, x // tile_count
        keys, values = sizes.keys, sizes.values(n, width)

        def step(t: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, refs.chunks, matmul, b, h, t)
            q, k = chunk.queries(keys), chunk.keys(keys)  # [C, K]
            decay, v = chunk.decay(), chunk.values(refs.v, values)  # v [C, V]
            if refs.chunks.scores is None:
                P = decay.weights * matmul.nt(q, k)  # [C, C]  Eq. 1
            else:
                P = chunk.padded(refs.chunks.scores, sizes.columns)  # [C, C]
            o = decay.times_prefix(matmul.nn(q, S)) + matmul.nn(P, v)  # [C, V]
            gpu.store(out.o, sizes.scale * o, b, sizes.tokens(t), h, values)  # Eq. 2
            added = matmul.tn(k, decay.times_suffix(v))  # [K, V]
            return chunk.times_total(decay, S, keys) + added  # [K, V]  Eq. 3

        S = gpu.load(refs.starts, b, part, h, keys, values).astype(jnp.float32)  # [K, V]
        S = lax.fori_loop(*sizes.part_chunks(part, parts), step, S)
        gpu.store(out.ends, S, b, part, h, keys, values)

    return gpu.call(
        "gla_forward",
        kernel,
        (tile_count * parts, sizes.batch * sizes.heads),
        inputs,
        ForwardOutputs(
            sizes.tokens_shape(inputs.v), jax.ShapeDtypeStruct(inputs.starts.shape, jnp.float32)
        ),
        warps=sizes.warps if sizes.key <= 128 else 8,
        interpret=sizes.interpret,
    )


class StateInputs(NamedTuple):
    chunks: ChunkInputs
    x: Any  # [B, T, H, V]: v, or do in reverse
    starts: Any  # [B, parts, H, K, V], the states (in reverse: gradients) that enter the parts


class StateOutputs(NamedTuple):
    # [B, H, G, K, V]: S, or in reverse dS', in the dtype of the matmuls that read them.
    boundaries: Any
    ends: Any  # [B, parts, H, K, V], the states (in reverse: gradients) that leave the parts


def walk_states(sizes: Sizes, inputs: StateInputs, reverse: bool, keep: bool) -> StateOutputs:
    """The states, Eq. 3, or in reverse their gradients, Eq. 4.

    keep: write them for each chunk; else only those that leave the parts."""
    parts = inputs.starts.shape[1]
    key_width, key_tiles = gpu.tiling(sizes.key, MAX_WIDTH)
    value_width, value_tiles = gpu.tiling(sizes.value, MAX_WIDTH)

    def kernel(refs: StateInputs, out: StateOutputs) -> None:
        matmul = gpu.Matmul(sizes.dtype)
        b, h, x = sizes.program()
        n, x = x % value_tiles, x // value_tiles
        m, part = x % key_tiles, x // key_tiles
        keys = sizes.channels(m, key_width, sizes.key)
        values = sizes.values(n, value_width)
        first, end = sizes.part_chunks(part, parts)

        def step(i: Any, S: jax.Array) -> jax.Array:
            chunk = Chunk(sizes, refs.chunks, matmul, b, h, end - 1 - i if reverse else i)
            if keep:
                gpu.store(out.boundaries, S, b, h, chunk.t, keys, values)
            decay, x = chunk.decay(), chunk.values(refs.x, values)  # x [C, V]
            S = chunk.times_total(decay, S, keys)  # [K, V]
            if not reverse:
                return S + matmul.tn(chunk.keys(keys), decay.times_suffix(x))  # Eq. 3
            x = sizes.scale * decay.times_prefix(x.astype(jnp.float32))  # [C, V]
            return S + matmul.tn(chunk.queries(keys), x)  # Eq. 4

        S = gpu.load(refs.starts, b, part, h, keys, values).astype(jnp.float32)  # [K, V]
        bounds = (0, end - first) if reverse else (first, end)
        S = lax.fori_loop(*bounds, step, S)
        gpu.store(out.ends, S, b, part, h, keys, values)

    boundaries = sizes.chunks_shape(sizes.key, sizes.value, dtype=sizes.dtype)
    return gpu.call(
        "gla_gradient_states" if reverse else "gla_states",
        kernel,
        (value_tiles * key_tiles * parts, sizes.batch * sizes.heads),
        inputs,
        StateOutputs(
            boundaries if keep else None, jax.ShapeDtypeStruct(inputs.starts.shape, jnp.float32)
        ),
        warps=sizes.warps,
        interpret=sizes.interpret,
    )
