"""The (gated) delta rule, one token after another in float32: the definition that every other
implementation is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def delta_rule(
    q, k, v, beta, decay_log, scale, initial_state, segment_ids, num_segments=None, reverse=False
):
    """D_t = Diag(exp(decay_log_t)) S_{t-1}
    S_t = D_t + beta_t k_t^T (v_t - k_t D_t)
    o_t = scale q_t S_t

    Shapes as in `api.py`, `initial_state` [B, H, K, V] or [B, S, H, K, V] given. Returns o [B, T,
    H, V] and the final state, both float32."""
    batch, length, heads, _ = v.shape
    key_size = k.shape[-1]
    group = heads // k.shape[2]
    q_BTHK, k_BTHK = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (q, k))
    v_BTHV, beta_BTH = v.astype(jnp.float32), beta.astype(jnp.float32)

    if decay_log is None:
        decay_BTHK = jnp.ones((batch, length, heads, key_size), jnp.float32)
    else:
        g = decay_log.astype(jnp.float32)
        g = {1: lambda: g[None, None, :, None], 3: lambda: g[..., None], 4: lambda: g}[g.ndim]()
        decay_BTHK = jnp.exp(jnp.broadcast_to(g, (batch, length, heads, key_size)))
    keep_BT, segment_BT = jnp.ones((batch, length), bool), jnp.zeros((batch, length), jnp.int32)
    if num_segments is not None:  # each token takes and leaves the state of its own segment
        segment_BT, states_BSHKV = segment_ids, initial_state
    else:  # one state, dropped where a segment starts; the first token continues the initial one
        states_BSHKV = initial_state[:, None]
        if segment_ids is not None:
            same = segment_ids[:, 1:] == segment_ids[:, :-1]
            first = (0, 1) if reverse else (1, 0)
            keep_BT = jnp.pad(same, ((0, 0), first), constant_values=True)
    every_B = jnp.arange(batch)

    def step(states_BSHKV, token):
        q_BHK, k_BHK, v_BHV, beta_BH, decay_BHK, keep_B, segment_B = token
        # Selected, not multiplied by zero: what is not finite ends with its segment.
        S_BHKV = jnp.where(keep_B[:, None, None, None], states_BSHKV[every_B, segment_B], 0.0)
        D_BHKV = decay_BHK[..., None] * S_BHKV
        read_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, D_BHKV, precision=lax.Precision.HIGHEST)
        write_BHV = beta_BH[..., None] * (v_BHV - read_BHV)
        S_BHKV = D_BHKV + k_BHK[..., None] * write_BHV[..., None, :]
        o_BHV = jnp.einsum("bhk,bhkv->bhv", scale * q_BHK, S_BHKV, precision=lax.Precision.HIGHEST)
        return states_BSHKV.at[every_B, segment_B].set(S_BHKV), o_BHV

    tokens = (q_BTHK, k_BTHK, v_BTHV, beta_BTH, decay_BTHK, keep_BT, segment_BT)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    states_BSHKV, o_TBHV = lax.scan(step, states_BSHKV.astype(jnp.float32), tokens, reverse=reverse)
    state = states_BSHKV[:, 0] if num_segments is None else states_BSHKV
    return jnp.moveaxis(o_TBHV, 0, 1), state
