"""State passing part by part in float32: the definition that every other form is held to."""

import jax.numpy as jnp
from jax import lax


def act(A, S):
    """A S [B, D, N] of every system, of A [D, N, N] and S [B, D, N]."""
    return jnp.einsum("dnk,bdk->bdn", A, S, precision=lax.Precision.HIGHEST)


def state_passing(A, written, keeps, initial_state, reverse=False):
    """S_{t+1} = keep_t A S_t + M_t.

    Shapes as in `api.py`; returns the states before the parts [B, T, D, N] and the last one
    [B, D, N], in float32."""
    A, first = A.astype(jnp.float32), initial_state.astype(jnp.float32)

    def step(S, part):
        M, keep_B = part
        kept = act(A, S)
        if keep_B is not None:
            kept = jnp.where(keep_B[:, None, None], kept, 0.0)
        return kept + M.astype(jnp.float32), S

    by_part = jnp.moveaxis(written, 1, 0), None if keeps is None else keeps.T
    last, before = lax.scan(step, first, by_part, reverse=reverse)
    return jnp.moveaxis(before, 0, 1), last
