"""State passing in plain JAX: the definition's scan over parts, with a backward pass of its own.

With lambda_t the gradient of S_t, the state before part t,

    lambda_t = keep_t A^T lambda_{t+1} + dS_t
    dM_t = lambda_{t+1}        dA = sum_t keep_t lambda_{t+1} S_t^T"""

import jax.numpy as jnp
from jax import lax

from .reference import act, state_passing

WALKS_BACKWARDS = True

forward = state_passing


def backward(A, written, keeps, initial_state, dbefore, dlast, *, reverse=False):
    """Gradients of A, written, keeps (None) and initial_state, float32."""
    before, _ = state_passing(A, written, keeps, initial_state, reverse)
    A = A.astype(jnp.float32)
    A_transposed = jnp.swapaxes(A, 1, 2)

    def step(after_BDN, part):  # lambda_{t+1} -> lambda_t
        dbefore_BDN, keep_B = part
        through_BDN = act(A_transposed, after_BDN)
        if keep_B is not None:
            through_BDN = jnp.where(keep_B[:, None, None], through_BDN, 0.0)
        return through_BDN + dbefore_BDN, after_BDN

    by_part = jnp.moveaxis(dbefore, 1, 0), None if keeps is None else keeps.T
    dinitial, dwritten = lax.scan(step, dlast, by_part, reverse=not reverse)
    dwritten = jnp.moveaxis(dwritten, 0, 1)
    through = dwritten if keeps is None else jnp.where(keeps[:, :, None, None], dwritten, 0.0)
    dA = jnp.einsum("btdn,btdk->dnk", through, before, precision=lax.Precision.HIGHEST)
    return dA, dwritten, None, dinitial
