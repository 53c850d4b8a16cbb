"""Linear attention with a denominator, for feature maps whose scores are positive."""

import jax
import jax.numpy as jnp

from ops.gated_linear_attention.api import gated_linear_attention


def normalised_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    eps: float,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """o_t = sum_{s <= t} (q_t k_s) v_s / (sum_{s <= t} q_t k_s + eps), [B, T, H, V], and the state.

    Both are float32; the state is [B, H, K, V + 1]. With `reverse` the sums are over s >= t.

    The denominator is the same sum with v = 1, so a column of ones is appended to v and the state's
    last column sums the keys. Float32 throughout: the op's output has v's dtype, and numerator and
    denominator must not be rounded before they are divided."""
    v_BTHV = v_BTHV.astype(jnp.float32)
    ones_BTH1 = jnp.ones((*v_BTHV.shape[:-1], 1), jnp.float32)
    o_BTHV, state = gated_linear_attention(
        q_BTHK,
        k_BTHK,
        jnp.concatenate((v_BTHV, ones_BTH1), axis=-1),
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        reverse=reverse,
    )
    return o_BTHV[..., :-1] / (o_BTHV[..., -1:] + eps), state
