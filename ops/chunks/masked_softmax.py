"""Softmax attention of a few queries to a few keys, by JAX's own function."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sees: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """o [N, T, H, V] in float32, zero for a query that sees nothing.

    q: [N, T, H, K]; k: [N, S, HK, K]; v: [N, S, HK, V]; what no query sees must be finite.
    sees: [N or 1, T, S] bool; None for all. bias: [H, T, S], added to the logits.

    `jax.nn.dot_product_attention` wants keys and values of one size, computes float32 at the
    default precision of the backend, and gives a query that sees nothing a mean."""
    key_size, value_size = k.shape[-1], v.shape[-1]
    size = max(key_size, value_size)
    q, k, v = (
        jnp.pad(x.astype(jnp.float32), ((0, 0),) * 3 + ((0, size - x.shape[-1]),))
        for x in (q, k, v)
    )
    mask = None if sees is None else jnp.broadcast_to(sees, (len(q), *sees.shape[1:]))[:, None]
    with jax.default_matmul_precision("highest"):
        o = jax.nn.dot_product_attention(
            *(q, k, v), bias=None if bias is None else bias[None], mask=mask, scale=scale
        )[..., :value_size]
    if sees is None:
        return o
    return jnp.where(sees.any(-1)[..., None, None], o, 0.0)
