"""Does a segment go on here? The one answer to it, for everything but the references.

`segment_ids` [B, T] are compared with their neighbours only: a segment is a run of equal ids, and
ids that come back start another. The first token goes on with what came before it, the initial
state. None stands for one segment everywhere; the answer is then None too, and nothing has to be
masked."""

from typing import Any

import jax
import jax.numpy as jnp


def starts(segment_ids: jax.Array | None, *, reverse: bool = False) -> Any:
    """[B, T] bool: whether a segment starts with this token; the first token starts none. In
    reverse the first token is the last of time, and the one before a token is its right
    neighbour."""
    if segment_ids is None:
        return None
    first = (0, 1) if reverse else (1, 0)
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), first))


def continues(segment_ids: jax.Array | None, *, reverse: bool = False) -> Any:
    """[B, T] bool: whether the state before a token reaches it, that of the token before it or, of
    the first, the initial state."""
    started = starts(segment_ids, reverse=reverse)
    return None if started is None else ~started


def numbers(segment_ids: jax.Array | None) -> Any:
    """[B, T] int32: how many segments have started up to this token, itself included; 0 for tokens
    that go on with the initial state."""
    if segment_ids is None:
        return None
    return jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)


def reaches_start(segment_ids: jax.Array | None, *, reverse: bool = False) -> Any:
    """[B, T] bool: whether a token is in the first token's segment and so sees the initial state;
    in reverse the first token is the last of time."""
    number = numbers(segment_ids)
    if number is None:
        return None
    return number == (number[:, -1:] if reverse else 0)


def reaches_end(segment_ids: jax.Array | None, *, reverse: bool = False) -> Any:
    """[B, T] bool: whether a token is in the last token's segment, so that the final state holds
    it; in reverse the last token is the first of time."""
    return reaches_start(segment_ids, reverse=not reverse)
