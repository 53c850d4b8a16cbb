"""The (gated) delta rule, one token after another in float32: the definition that every other
implementation is held to."""

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.segment_states import scan_segments


def delta_rule(q, k, v, beta, decay_log, scale, initial_state, segment_ids, num_segments=None):
    """D_t = Diag(exp(decay_log_t)) S_{t-1},   S_t = D_t + beta_t k_t^T (v_t - k_t D_t),   o_t =
                                               scale q_t S_t.

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
    if segment_ids is None or num_segments is not None:
        keep_BT = jnp.ones((batch, length), jnp.float32)
    else:  # the first token continues the initial state
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        keep_BT = jnp.concatenate([jnp.ones((batch, 1), bool), same], axis=1).astype(jnp.float32)

    def step(S_BHKV, token):
        q_BHK, k_BHK, v_BHV, beta_BH, decay_BHK, keep_B = token
        D_BHKV = keep_B[:, None, None, None] * decay_BHK[..., None] * S_BHKV
        read_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, D_BHKV, precision=lax.Precision.HIGHEST)
        write_BHV = beta_BH[..., None] * (v_BHV - read_BHV)
        S_BHKV = D_BHKV + k_BHK[..., None] * write_BHV[..., None, :]
        o_BHV = jnp.einsum("bhk,bhkv->bhv", scale * q_BHK, S_BHKV, precision=lax.Precision.HIGHEST)
        return S_BHKV, o_BHV

    tokens = (q_BTHK, k_BTHK, v_BTHV, beta_BTH, decay_BTHK, keep_BT)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    segment_TB = None if num_segments is None or segment_ids is None else segment_ids.T
    state, o_TBHV = scan_segments(step, initial_state.astype(jnp.float32), tokens, segment_TB)
    return jnp.moveaxis(o_TBHV, 0, 1), state
