"""Where tokens stand, in their documents and on grids."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ops.framework import segments


def token_positions(
    given_BT: jax.Array | None,
    start_B: jax.Array,
    length: int,
    segment_ids: jax.Array | None,
    *,
    reverse: bool = False,
) -> jax.Array:
    """Positions [B, T] of the next `length` tokens: the given ones or, for None, counted int32.

    The count goes on from `start_B` and starts at 0 where a document starts; in reverse it begins
    at the last token, and a document starts with its last."""
    if given_BT is not None:
        return given_BT
    index_T = jnp.arange(length, dtype=jnp.int32)
    index_T = length - 1 - index_T if reverse else index_T
    index_BT = jnp.broadcast_to(index_T[None, :], (start_B.shape[0], length))
    counted_BT = start_B[:, None] + index_BT
    if segment_ids is None:
        return counted_BT
    starts_BT = segments.starts(segment_ids, reverse=reverse)
    begin_BT = lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1, reverse=reverse)
    return jnp.where(begin_BT > 0, index_BT - begin_BT, counted_BT)


def next_position(positions_BT: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Where the token after the last one stands, [B] int32; in reverse the last is the first of
    time."""
    return (positions_BT[:, 0 if reverse else -1] + 1).astype(jnp.int32)


def resized_table(table_PD: jax.Array, grid: tuple[int, ...], to: tuple[int, ...]) -> jax.Array:
    """A table [P, D] for the places of `grid` as float32 for those of another one, bicubic; itself
    where they are the same."""
    table_PD = table_PD.astype(jnp.float32)
    if tuple(grid) == tuple(to):
        return table_PD
    width = table_PD.shape[-1]
    table_YXD = table_PD.reshape(*grid, width)
    return jax.image.resize(table_YXD, (*to, width), "cubic").reshape(-1, width)


def sinusoids(place: jax.Array, size: int, longest: float = 10_000.0) -> jax.Array:
    """[..., size] float32 of places [...]: cosines, then sines, of place * longest^(-i / half) for
    i = 0 .. half - 1, half = size / 2 (Vaswani et al., 2017, arXiv 1706.03762)."""
    half = size // 2
    frequency = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = place.astype(jnp.float32)[..., None] * frequency.reshape((1,) * place.ndim + (-1,))
    return jnp.concatenate((jnp.cos(angle), jnp.sin(angle)), axis=-1)


def grid_sinusoids(rows: int, columns: int, width: int) -> jax.Array:
    """[rows * columns, width] float32, a row for each place in raster order: half of it says the
    column, the other half the row. `width` is a multiple of 4."""
    row_YD = sinusoids(jnp.arange(rows), width // 2)
    column_XD = sinusoids(jnp.arange(columns), width // 2)
    both = (jnp.tile(column_XD, (rows, 1)), jnp.repeat(row_YD, columns, axis=0))
    return jnp.concatenate(both, axis=-1)
