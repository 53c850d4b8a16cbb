"""Attention within a circular neighbourhood of a grid: the public function."""

import jax

from ..framework import platforms
from ..framework.arguments import (
    attention_arrays,
    check_shape,
    checked_segment_ids,
    floats,
    mask_array,
    number,
    scale_of,
)
from ..framework.grid import check_grid
from ..framework.op import Op, run
from ..framework.sharding import time_parts
from . import reference, xla
from .sequence_parallel import RULES

OP = Op("neighbourhood_attention", {"xla": xla}, sequence_parallel=RULES)


def neighbourhood_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    grid: tuple[int, ...],
    radius: float,
    context_k: jax.Array | None = None,
    context_v: jax.Array | None = None,
    scale: float | None = None,
    key_mask: jax.Array | None = None,
    context_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each token of a grid to those nearer than a radius, and to a context.

        o_t = sum_s p_ts v_s        p_t = softmax_s(scale q_t k_s)
        over s with |position of s - position of t|^2 < radius^2, and all of the context

    (Liu et al., CLEAR, NeurIPS 2025, arXiv 2412.16112: the tokens of an image, whose context are
    those of its text, and perhaps averages of its own keys and values.) An interval in one
    dimension, a disc in two, a ball in three. Edges cut it; nothing wraps around.

    Args:
      q: [B, T, H, K], tokens in raster order, the last dimension of the grid fastest.
      k: [B, T, HK, K]. HK divides H; query head h reads key and value head h // (H / HK).
      v: [B, T, HK, V].
      grid: extents of 1 to 3 dimensions, T their product.
      radius: > 0; up to 1 a token sees itself alone.
      context_k: [B, S, HK, K], keys that every token sees; None means none.
      context_v: [B, S, HK, V], given where context_k is.
      scale: factor on the logits; None means K**-0.5.
      key_mask: [B, T] bool, the keys that there are; None means all. What stands in the others
        changes nothing.
      context_mask: [B, S] bool, likewise of the context.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: a token
        sees those neighbours that are in the run of equal ids that it is in. None means one
        segment.
      implementation: "reference" (one mask of T x T), "xla" (tiles of queries with what is around
        them, for `jax.nn.dot_product_attention`), or None for "xla". A named implementation runs or
        raises.

    Returns:
      o [B, T, H, V] in v's dtype, zeros where no key is there. All is computed in float32.
      Differentiable in q, k, v, context_k and context_v; only the inputs are kept for the backward
      pass, and the weights of one row of tiles are all that there are at a time. On a mesh that
      cuts time into whole rows (of the grid's first dimension) each device receives those within
      reach from its neighbours, and all keys and values where these have too few; on one that cuts
      rows each device gathers all of it.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a grid that does
        not have T tokens.
    """
    q, k, v = attention_arrays(q, k, v, same_length=True)
    grid = check_grid(grid, q.shape[1])
    radius = number("radius", radius, "a number > 0", lambda x: x > 0)
    if (context_k is None) != (context_v is None):
        raise ValueError("context_v must be given where context_k is, and only there")
    context_k, context_v = floats(context_k=context_k, context_v=context_v)
    if context_k is not None and context_v is not None:
        (batch, _, heads, key_size), value_size = k.shape, v.shape[3]
        shape = (batch, None, heads, key_size)
        check_shape("context_k", context_k, "[B, S, HK, K]", shape, " with B, HK and K of k")
        shape = (*context_k.shape[:3], value_size)
        check_shape("context_v", context_v, "[B, S, HK, V]", shape, " like context_k and v")
        context_mask = mask_array("context_mask", context_mask, *context_k.shape[:2])
    elif context_mask is not None:
        raise ValueError("context_mask must be None where there is no context_k")
    key_mask = mask_array("key_mask", key_mask, *k.shape[:2])
    segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    options = {"grid": grid, "radius": radius, "scale": scale_of(scale, q.shape[3])}
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(q)
    )
    # Rows that are cut are gathered.
    T = "L" if grid[0] % time_parts() else "T"
    arrays = (q, k, v, context_k, context_v, key_mask, context_mask, segment_ids)
    if implementation == "reference":
        return reference.neighbourhood_attention(*arrays, **options).astype(v.dtype)
    (o,) = run(
        OP,
        implementation,
        *arrays,
        layouts=(f"B{T}HK", f"B{T}GK", f"B{T}GV", "BSGK", "BSGV", f"B{T}", "BS", f"B{T}"),
        outputs=(f"B{T}HV",),
        dtypes=(v.dtype,),
        **options,
    )
    return o
