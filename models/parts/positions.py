"""Where tokens stand in their documents, for mixers that are not given positions."""

import jax
import jax.numpy as jnp
from jax import lax

from ops.framework import segments


def count_positions(start_B: jax.Array, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Positions [B, T] int32 of the next `length` tokens: on from `start_B`, and from 0 where a
    document starts."""
    index_BT = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None, :], (start_B.shape[0], length)
    )
    counted_BT = start_B[:, None] + index_BT
    if segment_ids is None:
        return counted_BT
    begin_BT = lax.cummax(jnp.where(segments.starts(segment_ids), index_BT, 0), axis=1)
    return jnp.where(begin_BT > 0, index_BT - begin_BT, counted_BT)
