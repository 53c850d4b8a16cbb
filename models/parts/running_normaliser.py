"""Sums of exponentials over the past of each token, in log space."""

import jax
import jax.numpy as jnp
from jax import lax

from ops.framework import segments


def running_normaliser(
    k_BTD: jax.Array, *, empty: float, initial_BD: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """z_t = log(exp(z_{t-1}) + exp(k_t)) per channel, and z_{t-1} itself, both [B, T, D] in
    float32.

    `initial_BD` stands before the first token and `empty`, the log of an empty sum (-inf, or 0 for
    a sum that starts at 1), before the first token of a later segment. Nothing overflows, whatever
    k is: no exponential of it is formed."""
    k_BTD = k_BTD.astype(jnp.float32)
    if segment_ids is None:
        starts_BT1 = jnp.zeros((*k_BTD.shape[:2], 1), bool)
    else:
        starts_BT1 = segments.starts(segment_ids)[..., None]
    own_BTD = jnp.where(starts_BT1, jnp.logaddexp(empty, k_BTD), k_BTD)
    own_BTD = own_BTD.at[:, 0].set(jnp.logaddexp(initial_BD, k_BTD[:, 0]))

    def combine(earlier, later):
        (starts, z), (later_starts, later_z) = earlier, later
        return starts | later_starts, jnp.where(later_starts, later_z, jnp.logaddexp(z, later_z))

    _, z_BTD = lax.associative_scan(combine, (starts_BT1, own_BTD), axis=1)
    before_BTD = jnp.concatenate((initial_BD[:, None], z_BTD[:, :-1]), axis=1)
    return z_BTD, jnp.where(starts_BT1, empty, before_BTD)
