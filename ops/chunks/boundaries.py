"""Where segments start inside chunks, as masks.

Decays across a boundary are zero, and so is what they multiply; but zero times what is not finite
is not zero. What a state carries over a boundary is therefore selected as well, so that an infinity
or a NaN ends with its segment. Products inside a chunk are left as they are. Letters as in
`chunking.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..framework.segments import starts


class Boundaries(NamedTuple):
    """Bools of all chunks, of which a scan over chunks sees one.

    from_start: [G, B, 1, C, 1], whether no segment starts between the start of the chunk and the
      token, itself included, which then reads the state before the chunk.
    to_end: [G, B, 1, C, 1], whether none starts after it, so that the state after the chunk has it.
    through: [G, B, 1, 1, 1], whether none starts in the chunk."""

    from_start: jax.Array
    to_end: jax.Array
    through: jax.Array


def boundaries(segment_ids: jax.Array | None, chunk: int) -> Boundaries | None:
    """The boundaries in chunks of C tokens of `segment_ids` [B, T]; None for None."""
    if segment_ids is None:
        return None
    start_BT = jnp.pad(starts(segment_ids), ((0, 0), (0, -segment_ids.shape[1] % chunk)))
    start_BGC = start_BT.reshape(len(start_BT), -1, chunk)
    number = jnp.cumsum(jnp.moveaxis(start_BGC, 1, 0), axis=-1)[:, :, None, :, None]
    last = number[:, :, :, -1:]
    return Boundaries(number == 0, number == last, last == 0)


def kept(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x, zero where the mask is false; None keeps all."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def masks(cut: Boundaries | None) -> tuple[jax.Array | None, ...]:
    """The three masks, None without boundaries."""
    return (None, None, None) if cut is None else cut
