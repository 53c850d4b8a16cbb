"""Diagonal convolution, one token after another in float32: the definition that every other
implementation is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def diagonal_convolution(u, a, b, c, initial_state, reverse=False):
    """h_t = a h_{t-1} + b u_t,  y_t = sum_m Re(c_m h_{t,m}).

    Shapes as in `api.py`; a, b, c and initial_state are tuples of their parts, complex64 where
    there are two. Returns y [B, T, D] in float32 and the final state [B, D, M] as such a tuple."""
    a_DM, b_DM, c_DM, h_BDM = (_number(parts) for parts in (a, b, c, initial_state))

    def step(h_BDM, u_BD):
        h_BDM = a_DM[None] * h_BDM + b_DM[None] * u_BD[:, :, None]
        return h_BDM, jnp.sum(jnp.real(c_DM[None] * h_BDM), axis=-1)

    h_BDM, y_TBD = lax.scan(step, h_BDM, jnp.moveaxis(u.astype(jnp.float32), 1, 0), reverse=reverse)
    final = (h_BDM.real, h_BDM.imag) if jnp.iscomplexobj(h_BDM) else (h_BDM,)
    return jnp.moveaxis(y_TBD, 0, 1), final


def _number(parts):
    parts = jax.tree.map(lambda part: part.astype(jnp.float32), tuple(parts))
    return lax.complex(*parts) if len(parts) == 2 else parts[0]
