"""Linear attention to all tokens with one matrix of weights, in float32: the definition that every
other implementation is held to."""

import jax.numpy as jnp
from jax import lax


def bidirectional_linear_attention(q, k, v, key_mask, segment_ids, normalise, eps):
    """o_i = sum_j (q_i k_j) v_j over the keys j that are there and in the segment of i.

    With `normalise` divided by sum_j q_i k_j + eps, and zero where that is zero.

    Shapes as in `api.py`; returns o [B, T, H, V] in float32."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k_BSHK, v_BSHV = (jnp.repeat(x, group, axis=2) for x in (k, v))
    sees_BTS = jnp.ones((q.shape[0], q.shape[1], k.shape[1]), bool)
    if segment_ids is not None:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))
        sees_BTS = number_BT[:, :, None] == number_BT[:, None, :]
    if key_mask is not None:
        sees_BTS = sees_BTS & key_mask[:, None, :]

    weights_BHTS = jnp.einsum("bthk,bshk->bhts", q, k_BSHK, precision=lax.Precision.HIGHEST)
    weights_BHTS = jnp.where(sees_BTS[:, None], weights_BHTS, 0.0)
    if normalise:
        sum_BHT1 = weights_BHTS.sum(-1, keepdims=True) + eps
        there = sum_BHT1 != 0
        weights_BHTS = jnp.where(there, weights_BHTS / jnp.where(there, sum_BHT1, 1.0), 0.0)
    if key_mask is not None:
        v_BSHV = jnp.where(key_mask[:, :, None, None], v_BSHV, 0.0)
    return jnp.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV, precision=lax.Precision.HIGHEST)
