"""Flow attention with all matrices written out, in float32: the definition that every other
implementation is held to."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

FEATURE_MAPS = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jax.nn.relu(x) + 1e-6,
    "identity": lambda x: x,
}


def _over(x, y):
    """x / y, zero where y is."""
    return jnp.where(y != 0, x / jnp.where(y != 0, y, 1.0), 0.0)


def flow_attention(
    q, k, v, query_mask, key_mask, segment_ids, *, feature_map, competition, allocation, clip, eps
):
    """R_i = sigmoid(Ihat_i L / S) (q_i / I_i) sum_j k_j^T c_j v_j over the sources j of i's
    segment; shapes as in `api.py`, o [B, T, H, V] in float32."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    if query_mask is None:
        query_mask = jnp.ones((batch, queries), bool)
    if key_mask is None:
        key_mask = jnp.ones((batch, keys), bool)

    def present(x, mask):
        return jnp.where(mask[:, :, None, None], x.astype(jnp.float32), 0.0)

    phi = FEATURE_MAPS[feature_map]
    q, k = (present(phi(present(x, m)), m) for x, m in ((q, query_mask), (k, key_mask)))
    v = present(v, key_mask)

    # Which sinks and sources are in one segment; the numbers of its sinks and of its sources.
    if segment_ids is None:
        number_BT, number_BS = (jnp.zeros(mask.shape, int) for mask in (query_mask, key_mask))
    else:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = number_BS = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))

    def same(a, b, mask):
        return ((a[:, :, None] == b[:, None, :]) & mask[:, None, :]).astype(jnp.float32)

    sources_BTS, sinks_BTT = (
        same(number_BT, number, mask)
        for number, mask in ((number_BS, key_mask), (number_BT, query_mask))
    )
    sinks_BST = same(number_BS, number_BT, query_mask)
    sources_BSS = same(number_BS, number_BS, key_mask)

    def flow(x, y, sees):
        return jnp.sum((x + eps) * (einsum("bts,bshk->bthk", sees, y) + eps), axis=-1)

    incoming_BTH, outgoing_BSH = flow(q, k, sources_BTS), flow(k, q, sinks_BST)
    conserved_in_BTH = flow(q, _over(k, outgoing_BSH[..., None]), sources_BTS)
    conserved_out_BSH = flow(k, _over(q, incoming_BTH[..., None]), sinks_BST)

    if competition:
        logits_BSH = conserved_out_BSH
        if clip is not None:
            logits_BSH = jnp.clip(logits_BSH, -clip, clip)
        logits_BHSS = jnp.swapaxes(logits_BSH, 1, 2)[:, :, None, :]
        logits_BHSS = jnp.where(sources_BSS[:, None] > 0, logits_BHSS, -1e30)
        log_sum_BSH = jnp.swapaxes(jax.nn.logsumexp(logits_BHSS, axis=-1), 1, 2)
        share_BSH = jnp.exp(jnp.minimum(logits_BSH - log_sum_BSH, 0.0))
        share_BSH = jnp.where(key_mask[..., None], share_BSH, 0.0)
        v = v * (sources_BSS.sum(-1)[..., None] * share_BSH)[..., None]
    weights_BHTS = einsum("bthk,bshk->bhts", _over(q, incoming_BTH[..., None]), k)
    o_BTHV = einsum("bhts,bts,bshv->bthv", weights_BHTS, sources_BTS, v)
    if allocation:
        ratio_BT = _over(sinks_BTT.sum(-1), sources_BTS.sum(-1))
        o_BTHV = o_BTHV * jax.nn.sigmoid(conserved_in_BTH * ratio_BT[..., None])[..., None]
    return o_BTHV
