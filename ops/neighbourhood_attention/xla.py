"""Attention within a ball in plain JAX on every backend, by tiles of the grid.

The queries of a tile of b tokens in each dimension see keys that are at most h, the largest integer
below the radius, outside of it: (b + 2 h)^n of them, of which one mask for all tiles takes the
ball. Rows of tiles take turns, each a batch for JAX's own attention, and are computed again in the
backward pass: only the inputs are kept.

Keys come with h rows before and behind those of the queries: zeros, or where time is cut over
devices those of the others (`sequence_parallel.py`).

Letters: B batch, T time, n dimensions, G tiles in a dimension, E = b + 2 h, S context."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..chunks.masked_softmax import attend
from ..framework import segments

# Least tokens of a tile in each of 1, 2 and 3 dimensions: 64 in all.
LEAST_EDGE = {1: 64, 2: 8, 3: 4}


def _edges(grid, reach):
    """b of each dimension: narrow tiles see more than they need, wide ones compute more."""
    return tuple(min(extent, max(LEAST_EDGE[len(grid)], reach)) for extent in grid)


def _ball(edges, reach, radius):
    """[b^n, E^n] bool: whether a key is nearer to a query than the radius."""
    squares = np.zeros((1,) * (2 * len(edges)), int)
    for axis, edge in enumerate(edges):
        query, key = np.arange(edge) + reach, np.arange(edge + 2 * reach)
        shape = [1] * (2 * len(edges))
        shape[axis], shape[len(edges) + axis] = len(query), len(key)
        squares = squares + ((query[:, None] - key[None, :]) ** 2).reshape(shape)
    return (squares < radius**2).reshape(math.prod(edges), -1)


def _pad(x, grid, before, after, fill=0):
    """[B, *grid, ...] of x [B, T, ...], padded in each dimension of the grid."""
    batch, _, *rest = x.shape
    x = x.reshape(batch, *grid, *rest)
    widths = ((0, 0), *zip(before, after, strict=True), *((0, 0),) * len(rest))
    return jnp.pad(x, widths, constant_values=fill)


def _tiles(x, edges, counts, overlap):
    """[B G.., (b + 2 overlap)^n, ...] of the tiles of one row [B, b + 2 overlap, padded.., ...]."""
    batch = x.shape[0]
    for axis, (edge, count) in enumerate(zip(edges[1:], counts[1:], strict=True)):
        index = np.arange(count)[:, None] * edge + np.arange(edge + 2 * overlap)[None, :]
        x = jnp.take(x, index, axis=2 + 2 * axis)  # [B, E, G, E, ...]
    n = len(edges)
    tiles = [2 + 2 * axis for axis in range(n - 1)]
    inside = [1, *(3 + 2 * axis for axis in range(n - 1))]
    x = x.transpose(0, *tiles, *inside, *range(2 * n, x.ndim))
    extent = math.prod(edge + 2 * overlap for edge in edges)
    return x.reshape(batch * math.prod(counts[1:]), extent, *x.shape[2 * n :])


def _row_of_tiles(o, batch, edges, counts):
    """[B, b, G b.., H, V] of tiles [B G.., b^n, H, V]."""
    n = len(edges)
    o = o.reshape(batch, *counts[1:], *edges, *o.shape[-2:])
    pairs = [axis for i in range(n - 1) for axis in (1 + i, n + 1 + i)]
    o = o.transpose(0, n, *pairs, 2 * n, 2 * n + 1)
    sizes = [edge * count for edge, count in zip(edges[1:], counts[1:], strict=True)]
    return o.reshape(batch, edges[0], *sizes, *o.shape[-2:])


def reach_of(grid, radius):
    """h, the most places in a dimension between a token and one that it sees."""
    # What is farther than the grid is wide is not there.
    return min(math.ceil(radius) - 1, max(grid) - 1)


def outputs(qkv, runs, context, *, grid, reach, radius, scale):
    """o [B, T, H, V] in float32 of the queries of `grid`.

    qkv: k and v are of `reach` rows more before and behind. runs: numbers of the segments of
    queries and of keys, -1 for a key that is not there. context: keys, values and mask, each may be
    None."""
    (q, k, v), (q_runs, k_runs), (context_k, context_v, context_mask) = qkv, runs, context
    batch = len(q)
    edges = _edges(grid, reach)
    counts = tuple(-(-extent // edge) for extent, edge in zip(grid, edges, strict=True))
    after = [edge * count - x for edge, count, x in zip(edges, counts, grid, strict=True)]
    ball = jnp.asarray(_ball(edges, reach, radius))
    k, v = (jnp.where(k_runs[:, :, None, None] < 0, 0, x) for x in (k, v))
    if context_mask is not None:
        keep = context_mask[:, :, None, None]
        context_k, context_v = (jnp.where(keep, x, 0) for x in (context_k, context_v))
    elif context_k is not None:
        context_mask = jnp.ones(context_k.shape[:2], bool)

    whole = (grid[0] + 2 * reach, *grid[1:])
    around = (0, *(reach,) * (len(grid) - 1))
    more = [x + y for x, y in zip(after, around, strict=True)]
    q, q_runs = (_pad(x, grid, (0,) * len(grid), after) for x in (q, q_runs))
    k, v, k_runs = (
        _pad(x, whole, around, more, fill) for x, fill in ((k, 0), (v, 0), (k_runs, -1))
    )

    def repeated(x):
        return jnp.repeat(x, math.prod(counts[1:]), axis=0)

    @jax.checkpoint
    def one(row):
        def rows(x, overlap):
            size = edges[0] + 2 * overlap
            part = lax.dynamic_slice_in_dim(x, row * edges[0], size, axis=1)
            return _tiles(part, edges, counts, overlap)

        near_q, of_q = rows(q, 0), rows(q_runs, 0)
        near_k, near_v, of_k = (rows(x, reach) for x in (k, v, k_runs))
        sees = ball[None] & (of_q[:, :, None] == of_k[:, None, :])
        if context_k is not None:
            near_k, near_v = (
                jnp.concatenate([x, repeated(y)], axis=1)
                for x, y in ((near_k, context_k), (near_v, context_v))
            )
            there = repeated(context_mask)[:, None, :]
            there = jnp.broadcast_to(there, (*sees.shape[:2], there.shape[2]))
            sees = jnp.concatenate([sees, there], axis=2)
        o = attend(near_q, near_k, near_v, sees, None, scale)
        return _row_of_tiles(o, batch, edges, counts)

    o = lax.map(one, jnp.arange(counts[0]))  # [G, B, b, padded.., H, V]
    o = jnp.moveaxis(o, 0, 1).reshape(batch, counts[0] * edges[0], *o.shape[3:])
    o = o[(slice(None), *(slice(0, extent) for extent in grid))]
    return o.reshape(batch, math.prod(grid), *o.shape[-2:])


def _whole(
    q, k, v, context_k, context_v, key_mask, context_mask, segment_ids, *, grid, radius, scale
):
    """`outputs` where all keys are here."""
    q_runs = jnp.zeros(q.shape[:2], jnp.int32)
    if segment_ids is not None:
        q_runs = segments.numbers(segment_ids)
    k_runs = q_runs if key_mask is None else jnp.where(key_mask, q_runs, -1)
    reach = reach_of(grid, radius)
    rows = reach * math.prod(grid[1:])
    k, v = (jnp.pad(x, ((0, 0), (rows, rows), (0, 0), (0, 0))) for x in (k, v))
    k_runs = jnp.pad(k_runs, ((0, 0), (rows, rows)), constant_values=-1)
    context = (context_k, context_v, context_mask)
    sizes = {"grid": grid, "reach": reach, "radius": radius, "scale": scale}
    return outputs((q, k, v), (q_runs, k_runs), context, **sizes)


def forward(q, k, v, context_k, context_v, key_mask, context_mask, segment_ids, **options):
    """(o,) in float32; shapes as in `api.py`."""
    arrays = (q, k, v, context_k, context_v, key_mask, context_mask, segment_ids)
    return (_whole(*arrays, **options),)


def backward(q, k, v, context_k, context_v, key_mask, context_mask, segment_ids, do, **options):
    """Gradients of q, k, v, context_k and context_v, None where there is no context."""

    def whole(q, k, v, context_k, context_v):
        arrays = (q, k, v, context_k, context_v, key_mask, context_mask, segment_ids)
        return _whole(*arrays, **options)

    _, pullback = jax.vjp(whole, q, k, v, context_k, context_v)
    return pullback(do.astype(jnp.float32))
