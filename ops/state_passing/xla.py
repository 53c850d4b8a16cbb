"""State passing with the adjoint recurrence as backward pass:

lambda_t = keep_t A^T lambda_{t+1} + dS_t        dM_t = lambda_{t+1}        dA = sum_t keep_t
lambda_{t+1} S_t^T"""

import jax.numpy as jnp
from jax import lax

from .reference import act, state_passing

WALKS_BACKWARDS = True

forward = state_passing


def backward(A, written, keeps, initial_state, dbefore, dlast, *, reverse=False):
    """Gradients of A, written, keeps (None) and initial_state, in float32."""
    before, _ = state_passing(A, written, keeps, initial_state, reverse)
    A = A.astype(jnp.float32)
    A_transposed = jnp.swapaxes(A, 1, 2)
    kept = None if keeps is None else keeps[:, :, None, None]

    def step(gradient, part):
        d, keep_B = part
        back = act(A_transposed, gradient)
        if keep_B is not None:
            back = jnp.where(keep_B[:, None, None], back, 0.0)
        return back + d, gradient

    by_part = jnp.moveaxis(dbefore, 1, 0), None if keeps is None else keeps.T
    dinitial, dwritten = lax.scan(step, dlast, by_part, reverse=not reverse)
    dwritten = jnp.moveaxis(dwritten, 0, 1)
    through = dwritten if kept is None else jnp.where(kept, dwritten, 0.0)
    dA = jnp.einsum("btdn,btdk->dnk", through, before, precision=lax.Precision.HIGHEST)
    return dA, dwritten, None, dinitial
