"""Time-invariant systems whose time is cut over devices: every device runs its part from a zero
state, and states alone pass between them.

Letters: R parts of n tokens, P of all sequences, as in `ops/framework/time_parts.py`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..framework.sharding import parts_as_batch, time_parts
from ..framework.time_parts import documents, to_parts, to_whole
from .api import state_passing


def in_parts(
    from_zero: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]],
    passed: Callable[..., tuple[jax.Array, jax.Array]],
    response: Callable[[jax.Array, int], jax.Array],
    u: jax.Array,
    *,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, ...] of u [B, T, ...] and the state after the last token [B, D, N].

    from_zero: u and the numbers of segments [P, n] of each part (None: one segment) -> the output
      and the state [P, D, N] that each part leaves, from a zero state before it.
    passed: the state that each part leaves [B, R, D, N], whether it hands on what came in [B, R]
      (None: all do), the state before the first part [B, D, N] or None, the length of a part -> the
      state before each part [B, R, D, N], the one after the last; `passing` makes it.
    response: states before the parts [P, D, N], length -> what they add to the output [P, n, ...].
    initial_state: [B, D, N]; None means zeros.
    segment_ids: [B, T]; the state starts from zero where the id changes.
    reverse: whether to walk from the last token to the first. The functions above get each part
      flipped, and parts pass their states on from the last to the first.

    Raises ValueError for a length that is not a multiple of the devices along time.
    """
    parts, (batch, length) = time_parts(), u.shape[:2]
    number_Pn = None
    if segment_ids is not None:
        number_Pn = _turned(documents(segment_ids, batch, length, parts, reverse=reverse), reverse)
    with parts_as_batch():
        y_Pn, written_PDN = from_zero(_turned(to_parts(u, parts), reverse), number_Pn)
    size = length // parts
    keeps_BR = None if number_Pn is None else to_whole(number_Pn[:, -1:] == 0, parts)
    before_BRDN, last_BDN = passed(
        to_whole(written_PDN[:, None], parts), keeps_BR, initial_state, size
    )
    response_Pn = response(to_parts(before_BRDN, parts)[:, 0], size)
    if number_Pn is not None:
        of_state_Pn = (number_Pn == 0).reshape(*number_Pn.shape, *(1,) * (y_Pn.ndim - 2))
        response_Pn = jnp.where(of_state_Pn, response_Pn, 0.0)
    return to_whole(_turned(y_Pn + response_Pn, reverse), parts), last_BDN


def _turned(x_Pn: jax.Array, reverse: bool) -> jax.Array:
    """Each part in the order of the walk, or back in the order of tokens."""
    return x_Pn[:, ::-1] if reverse else x_Pn


def passing(
    transition: Callable[[int], jax.Array], *, reverse: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`passed` of systems whose transition(length) is A^length [D, N, N]."""

    def passed(
        written_BRDN: jax.Array,
        keeps_BR: jax.Array | None,
        initial_state: jax.Array | None,
        length: int,
    ) -> tuple[jax.Array, jax.Array]:
        return state_passing(
            transition(length),
            written_BRDN,
            keeps=keeps_BR,
            initial_state=initial_state,
            reverse=reverse,
        )

    return passed
