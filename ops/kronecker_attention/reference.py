"""Kronecker attention by all its T^3 scores in float32: the definition that every other
implementation is held to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def kronecker_attention(q, k1, k2, v1, v2, segment_ids, *, scale, causal):
    """o [B, T, H, V] in float32; shapes as in `api.py`."""
    q, k1, k2, v1, v2 = (x.astype(jnp.float32) for x in (q, k1, k2, v1, v2))
    sees_BTT = jnp.ones((len(q), q.shape[1], q.shape[1]), bool)
    if segment_ids is not None:
        changes_BT = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        segment_BT = jnp.cumsum(changes_BT, axis=1)
        sees_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    if causal:
        sees_BTT = jnp.tril(sees_BTT)
    pairs_BTTT = sees_BTT[:, :, :, None] & sees_BTT[:, :, None, :]
    scores = scale * einsum("bihl,bjhl,bkhl->bhijk", q, k1, k2)
    scores = jnp.where(pairs_BTTT[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=(3, 4))
    return einsum("bhijk,bjhv,bkhv->bihv", weights, v1, v2)
