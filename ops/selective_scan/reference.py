"""Selective scan, one token after another in float32: the definition that every other
implementation is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def selective_scan(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    eigenvalue_range,
    initial_state,
    segment_ids,
    reverse=False,
):
    """h_t = abar_t h_{t-1} + delta_t x_t B_t,   y_t = (h_t C_t + D x_t) silu(z_t),

    abar = exp(delta A) or 2 exp(delta A) - 1, delta after its bias and softplus.

    Shapes as in `api.py`, `initial_state` [B, D, N] given. Returns y [B, T, D] and the final state,
    both float32."""
    x_BTD, delta_BTD, A_DN, B_BTN, C_BTN = (
        array.astype(jnp.float32) for array in (x, delta, A, B, C)
    )
    if delta_bias is not None:
        delta_BTD = delta_BTD + delta_bias.astype(jnp.float32)[None, None, :]
    if delta_softplus:
        delta_BTD = jnp.logaddexp(delta_BTD, 0.0)
    if segment_ids is None:
        keep_BT = jnp.ones(x.shape[:2], bool)
    else:  # the first token continues the initial state
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        first = (0, 1) if reverse else (1, 0)
        keep_BT = jnp.pad(same, ((0, 0), first), constant_values=True)

    def step(h_BDN, token):
        x_BD, delta_BD, B_BN, C_BN, keep_B = token
        abar_BDN = jnp.exp(delta_BD[:, :, None] * A_DN[None, :, :])
        if eigenvalue_range == (-1, 1):
            abar_BDN = 2 * abar_BDN - 1
        write_BDN = (delta_BD * x_BD)[:, :, None] * B_BN[:, None, :]
        # Selected, not multiplied by zero: what is not finite ends with its segment.
        h_BDN = abar_BDN * jnp.where(keep_B[:, None, None], h_BDN, 0.0) + write_BDN
        return h_BDN, jnp.einsum("bdn,bn->bd", h_BDN, C_BN, precision=lax.Precision.HIGHEST)

    tokens = jax.tree.map(
        lambda array: jnp.moveaxis(array, 1, 0), (x_BTD, delta_BTD, B_BTN, C_BTN, keep_BT)
    )
    state, y_TBD = lax.scan(step, initial_state.astype(jnp.float32), tokens, reverse=reverse)
    y_BTD = jnp.moveaxis(y_TBD, 0, 1)
    if D is not None:
        y_BTD = y_BTD + D.astype(jnp.float32)[None, None, :] * x_BTD
    if z is not None:
        z_BTD = z.astype(jnp.float32)
        y_BTD = y_BTD * z_BTD * jax.nn.sigmoid(z_BTD)
    return y_BTD, state
