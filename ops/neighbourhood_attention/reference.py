"""Attention within a ball of a grid by one mask, in float32: the definition that every other
implementation is held to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def neighbourhood_attention(
    q, k, v, context_k, context_v, key_mask, context_mask, segment_ids, *, grid, radius, scale
):
    """o_t = sum_s p_ts v_s over the tokens s nearer than `radius` and the context, p_t =
    softmax(scale q_t k_s); shapes as in `api.py`, o [B, T, H, V] in float32, zero where nothing is
    seen."""
    batch, length = q.shape[:2]
    group = q.shape[2] // k.shape[2]
    stride, squares_TT = 1, jnp.zeros((length, length), int)
    for extent in reversed(grid):
        coordinate = jnp.arange(length) // stride % extent
        squares_TT = squares_TT + (coordinate[:, None] - coordinate[None, :]) ** 2
        stride *= extent
    sees_BTS = jnp.broadcast_to((squares_TT < radius**2)[None], (batch, length, length))
    if segment_ids is not None:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))
        sees_BTS = sees_BTS & (number_BT[:, :, None] == number_BT[:, None, :])
    if key_mask is not None:
        sees_BTS = sees_BTS & key_mask[:, None, :]
    if context_k is not None:
        there = context_mask
        if there is None:
            there = jnp.ones(context_k.shape[:2], bool)
        there_BTS = jnp.broadcast_to(there[:, None, :], (batch, length, there.shape[1]))
        sees_BTS = jnp.concatenate([sees_BTS, there_BTS], axis=2)
        k, v = jnp.concatenate([k, context_k], axis=1), jnp.concatenate([v, context_v], axis=1)

    seen_BS = sees_BTS.any(1)[:, :, None, None]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(jnp.where(seen_BS, x, 0.0), group, axis=2) for x in (k, v))
    logits_BHTS = scale * einsum("bthk,bshk->bhts", q, k)
    weights = jax.nn.softmax(jnp.where(sees_BTS[:, None], logits_BHTS, -1e30), axis=-1)
    return einsum("bhts,bshv->bthv", jnp.where(sees_BTS[:, None], weights, 0.0), v)
