"""The states between parts of time, one part for each device, of a time-invariant recurrence."""

import jax

from ..framework.time_parts import to_parts, to_whole
from .api import state_passing


def states_before(
    transition: jax.Array,
    written: jax.Array,
    continues: jax.Array | None,
    initial_state: jax.Array | None,
    parts: int,
) -> tuple[jax.Array, jax.Array]:
    """The state each part receives [P, D, N], and the one after the last [B, D, N], of a
    time-invariant recurrence.

    transition [D, N, N] is that of a whole part, written [P, D, N] what each leaves from a zero
    state, continues [P] whether the document that comes in is the one that goes out (None: always).
    """
    before, last = state_passing(
        transition,
        to_whole(written[:, None], parts),
        keeps=None if continues is None else to_whole(continues[:, None], parts),
        initial_state=initial_state,
    )
    return to_parts(before, parts)[:, 0], last
