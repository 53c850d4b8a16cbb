"""Dense scan with its time on several devices: each runs its part from a zero state, states pass
from part to part, and the response to the state that came in is added.

    A over a part of n tokens is A^n        what its token t reads of the state before is C A^(t+1)
"""

from collections.abc import Callable

import jax

from ..state_passing.parts import in_parts, passing
from .powers import matrix_power
from .xla import forward, free_response


def forward_in_parts(
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    kernel: Callable[[int], jax.Array] | None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the final state [B, D, N], as `xla.forward` makes them without a mesh."""
    return in_parts(
        lambda u_PnD, ids_Pn: forward(u_PnD, A, B, C, None, ids_Pn, kernel),
        passing(lambda length: matrix_power(A, length), reverse=reverse),
        lambda x_PDN, length: free_response(x_PDN, A, C, length),
        u,
        initial_state=initial_state,
        segment_ids=segment_ids,
        reverse=reverse,
    )
