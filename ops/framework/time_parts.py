"""Parts of time, one for each device along the mesh's sequence axis, as rows of a batch.

A layer that rearranges tokens in time does so within its part: what passes from part to part is
what would pass from call to call. Letters besides the usual: R parts of n = T / R tokens, P = R B
of them in all, first the first parts of all sequences, so that what a device holds stays together.
Without a mesh that cuts time R is 1, and nothing moves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import segments
from .sharding import constrain


def to_parts(x: jax.Array, parts: int) -> jax.Array:
    """The parts [P, n, ...] of arrays [B, T, ...].

    Raises ValueError for a length that is not a multiple of the parts."""
    batch, length, *rest = x.shape
    if length % parts:
        raise ValueError(
            f"the length must be a multiple of the {parts} devices along time; got {length}"
        )
    x = jnp.swapaxes(x.reshape(batch, parts, -1, *rest), 0, 1)
    x = x.reshape(parts * batch, -1, *rest)
    return constrain(x, "P" + "n" * (x.ndim - 1))


def to_whole(x: jax.Array, parts: int) -> jax.Array:
    """The sequences [B, T, ...] of parts [P, n, ...]."""
    rows, _, *rest = x.shape
    x = jnp.swapaxes(x.reshape(parts, -1, *x.shape[1:]), 0, 1)
    x = x.reshape(rows // parts, -1, *rest)
    return constrain(x, "BT" + "n" * len(rest))


def documents(
    segment_ids: jax.Array | None, batch: int, length: int, parts: int, *, reverse: bool = False
) -> jax.Array:
    """Numbers of documents [P, n]; 0 for the one that goes on from the part before.

    Counted up from the first token of each part, in reverse from the last."""
    if segment_ids is None:
        return jnp.zeros((batch * parts, length // parts), jnp.int32)
    starts_Pn = to_parts(segments.starts(segment_ids, reverse=reverse), parts).astype(jnp.int32)
    return lax.cumsum(starts_Pn, axis=1, reverse=reverse)


def along_parts(
    step: Callable[[Any, Any], Any], first: Any, values: Any, parts: int
) -> tuple[Any, Any]:
    """What each part receives [P, ...], and what the last one leaves [B, ...].

    The first part receives `first` [B, ...], and each part turns what it receives into
    step(received, value of the part); values are trees of [P, ...].

    Every device goes through all parts: their values are gathered once, before the first."""

    def everywhere(x: jax.Array) -> jax.Array:
        return constrain(x, "nB" + "_" * (x.ndim - 2))

    def by_part(x: jax.Array) -> jax.Array:
        return everywhere(x.reshape(parts, -1, *x.shape[1:]))

    def of_each(x: jax.Array) -> jax.Array:
        x = everywhere(x)
        x = x.reshape(-1, *x.shape[2:])
        return constrain(x, "P" + "_" * (x.ndim - 1))

    last, received = lax.scan(
        lambda carried, value: (step(carried, value), carried), first, jax.tree.map(by_part, values)
    )
    return jax.tree.map(of_each, received), last
