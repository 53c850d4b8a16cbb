"""Short convolution, one token after another in float32: the definition that every other
implementation is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def short_convolution(x, w, initial_state, segment_ids, reverse=False):
    """y_t = w_{W-1} x_t + sum_j w_j buffer_j; the buffer holds the W - 1 inputs before x_t, oldest
    first.

    Shapes as in `api.py`, `initial_state` [B, W - 1, D] given. Returns y [B, T, D] and the final
    buffer, both float32."""
    x_BTD, w_WD = x.astype(jnp.float32), w.astype(jnp.float32)
    if segment_ids is None:
        starts_BT = jnp.zeros(x.shape[:2], bool)
    else:  # the first token continues the initial state
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts_BT = jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)))

    def step(buffer_BWD, token):
        x_BD, start_B = token
        buffer_BWD = jnp.where(start_B[:, None, None], 0.0, buffer_BWD)
        inputs_BWD = jnp.concatenate([buffer_BWD, x_BD[:, None, :]], axis=1)
        return inputs_BWD[:, 1:], (w_WD[None, :, :] * inputs_BWD).sum(1)

    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x_BTD, starts_BT))
    state, y_TBD = lax.scan(step, initial_state.astype(jnp.float32), tokens, reverse=reverse)
    return jnp.moveaxis(y_TBD, 0, 1), state
