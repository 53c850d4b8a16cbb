"""Dense scan, one token after another in float32: the definition that every other implementation is
held to."""

import jax.numpy as jnp
from jax import lax


def dense_scan(u, A, B, C, initial_state, segment_ids, reverse=False):
    """x_t = A x_{t-1} + B u_t,  y_t = C x_t.

    Shapes as in `api.py`; returns y [B, T, D, M] and the final state [B, D, N], both float32."""
    u, A, B, C, initial_state = (array.astype(jnp.float32) for array in (u, A, B, C, initial_state))
    if segment_ids is None:
        keep_BT = jnp.ones(u.shape[:2], bool)
    else:  # the first token continues the initial state
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        first = (0, 1) if reverse else (1, 0)
        keep_BT = jnp.pad(same, ((0, 0), first), constant_values=True)

    def step(x_BDN, token):
        u_BD, keep_B = token
        x_BDN = jnp.where(keep_B[:, None, None], x_BDN, 0.0)
        x_BDN = _product("dnk,bdk->bdn", A, x_BDN) + _product("dn,bd->bdn", B, u_BD)
        return x_BDN, _product("dmn,bdn->bdm", C, x_BDN)

    by_token = jnp.moveaxis(u, 1, 0), keep_BT.T
    final_state, y_TBDM = lax.scan(step, initial_state, by_token, reverse=reverse)
    return jnp.moveaxis(y_TBDM, 0, 1), final_state


def _product(subscripts, *factors):
    return jnp.einsum(subscripts, *factors, precision=lax.Precision.HIGHEST)
