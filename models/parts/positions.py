"""Where tokens stand in their documents."""

import jax
import jax.numpy as jnp
from jax import lax

from ops.framework import segments


def token_positions(
    given_BT: jax.Array | None, start_B: jax.Array, length: int, segment_ids: jax.Array | None
) -> jax.Array:
    """Positions [B, T] of the next `length` tokens: the given ones or, for None, counted int32.

    The count goes on from `start_B` and starts at 0 where a document starts."""
    if given_BT is not None:
        return given_BT
    index_BT = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None, :], (start_B.shape[0], length)
    )
    counted_BT = start_B[:, None] + index_BT
    if segment_ids is None:
        return counted_BT
    begin_BT = lax.cummax(jnp.where(segments.starts(segment_ids), index_BT, 0), axis=1)
    return jnp.where(begin_BT > 0, index_BT - begin_BT, counted_BT)


def next_position(positions_BT: jax.Array) -> jax.Array:
    """Where the token after the last one stands, [B] int32."""
    return (positions_BT[:, -1] + 1).astype(jnp.int32)
