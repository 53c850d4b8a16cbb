"""Attention within windows of a grid by one mask, in float32: the definition that every other
implementation is held to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def shifted_window_attention(q, k, v, bias, key_mask, segment_ids, *, grid, window, shift, scale):
    """o_t = sum_s p_ts v_s over the tokens s of t's window, p_t = softmax(scale q_t k_s + bias);
    shapes as in `api.py`, o [B, T, H, V] in float32, zero where nothing is seen."""
    batch, length = q.shape[:2]
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))

    near_TT, place_T = jnp.ones((length, length), bool), jnp.zeros(length, int)
    for extent, size, by, stride, inner in _strides(grid, window, shift):
        coordinate = jnp.arange(length) // stride % extent
        moved = (coordinate - by) % extent
        # Windows start at `by`; tokens before it are those of the last window that the edge cuts.
        for value in (moved // size, coordinate < by):
            near_TT &= value[:, None] == value[None, :]
        place_T = place_T + moved % size * inner
    sees_BTT = jnp.broadcast_to(near_TT[None], (batch, length, length))
    if segment_ids is not None:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))
        sees_BTT = sees_BTT & (number_BT[:, :, None] == number_BT[:, None, :])
    if key_mask is not None:
        sees_BTT = sees_BTT & key_mask[:, None, :]
        k, v = (jnp.where(key_mask[:, :, None, None], x, 0.0) for x in (k, v))

    logits_BHTT = scale * einsum("bthk,bshk->bhts", q, k)
    if bias is not None:
        of_pair_HTT = bias.astype(jnp.float32)[:, place_T[:, None], place_T[None, :]]
        logits_BHTT = logits_BHTT + of_pair_HTT[None]
    weights = jax.nn.softmax(jnp.where(sees_BTT[:, None], logits_BHTT, -1e30), axis=-1)
    weights = jnp.where(sees_BTT[:, None], weights, 0.0)
    return einsum("bhts,bshv->bthv", weights, v)


def _strides(grid, window, shift):
    """Of each dimension its extent, window and shift, and what a step in it adds to the index of a
    token in the grid and in its window."""
    stride = inner = 1
    for extent, size, by in reversed(list(zip(grid, window, shift, strict=True))):
        yield extent, size, by, stride, inner
        stride, inner = stride * extent, inner * size
