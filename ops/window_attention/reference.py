"""Window attention with one mask, in float32: the definition that every other implementation is
held to."""

import jax
import jax.numpy as jnp
from jax import lax


def window_attention(q, k, v, k_past, v_past, valid_past, segment_ids, window, scale, activation):
    """o_t = sum_s p_ts v_s over the tokens s of t's segment with t - window < s <= t,
    p_t = softmax of scale q_t k_s or p_ts = max(scale q_t k_s, 0)^2.

    Shapes as in `api.py`; k_past [B, window - 1, HK, K], v_past and valid_past are the initial
    state. Returns o [B, T, H, V] in float32 and k, v, valid of the last window - 1 tokens."""
    past, length = k_past.shape[1], q.shape[1]
    dtypes, group = (k.dtype, v.dtype), q.shape[2] // k.shape[2]
    q, k, v, k_past, v_past = (x.astype(jnp.float32) for x in (q, k, v, k_past, v_past))
    k, v = jnp.concatenate([k_past, k], axis=1), jnp.concatenate([v_past, v], axis=1)
    k_BSHK, v_BSHV = (jnp.repeat(x, group, axis=2) for x in (k, v))

    # Two tokens are in one segment if the id does not change between them; the past is in the first
    # token's.
    changes_BT = jnp.zeros(q.shape[:2], bool)
    if segment_ids is not None:
        changes_BT = changes_BT.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    segment_BS = jnp.pad(jnp.cumsum(changes_BT, axis=1), ((0, 0), (past, 0)))
    valid_BS = jnp.concatenate([valid_past, jnp.ones(q.shape[:2], bool)], axis=1)
    same_BSS = (segment_BS[:, :, None] == segment_BS[:, None, :]) & valid_BS[:, None, :]
    distance_TS = past + jnp.arange(length)[:, None] - jnp.arange(past + length)[None, :]
    sees_BTS = same_BSS[:, past:] & ((distance_TS >= 0) & (distance_TS < window))[None]

    @jax.checkpoint
    def of_token(token):
        q_BHK, sees_BS = token
        # Selected, not multiplied by zero: what is not finite reaches no token that cannot see it.
        seen = sees_BS[:, :, None, None]
        k, v = jnp.where(seen, k_BSHK, 0), jnp.where(seen, v_BSHV, 0)
        logits_BHS = scale * jnp.einsum("bhk,bshk->bhs", q_BHK, k, precision=lax.Precision.HIGHEST)
        if activation == "squared_relu":
            p_BHS = jnp.where(sees_BS[:, None], jnp.maximum(logits_BHS, 0) ** 2, 0)
        else:
            p_BHS = jax.nn.softmax(jnp.where(sees_BS[:, None], logits_BHS, -jnp.inf), axis=-1)
        return jnp.einsum("bhs,bshv->bhv", p_BHS, v, precision=lax.Precision.HIGHEST)

    o_TBHV = lax.map(of_token, (jnp.moveaxis(q, 1, 0), jnp.moveaxis(sees_BTS, 1, 0)))
    o_BTHV = jnp.moveaxis(o_TBHV, 0, 1)

    valid = same_BSS[:, -1, length:]
    k, v = (jnp.where(valid[:, :, None, None], x[:, length:], 0.0) for x in (k, v))
    return o_BTHV, k.astype(dtypes[0]), v.astype(dtypes[1]), valid
