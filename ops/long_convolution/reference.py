"""Long convolution as a sum over all earlier tokens in float32: the definition that every other
implementation is held to."""

import jax.numpy as jnp
from jax import lax


def long_convolution(u, kernel, segment_ids):
    """y_t = sum of kernel_{t-s} u_s over the tokens s <= t of t's segment.

    By the lower-triangular Toeplitz matrix of every channel. Shapes as in `api.py`; returns y
    [B, T, D] in float32."""
    lag_TT = jnp.arange(u.shape[1])[:, None] - jnp.arange(u.shape[1])[None, :]
    toeplitz_DTT = jnp.where(
        (lag_TT >= 0)[None], kernel.astype(jnp.float32)[:, jnp.abs(lag_TT)], 0.0
    )
    if segment_ids is None:
        same_BTT = jnp.ones((u.shape[0], *lag_TT.shape))
    else:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))
        same_BTT = (number_BT[:, :, None] == number_BT[:, None, :]).astype(jnp.float32)
    return jnp.einsum(
        "dts,bts,bsd->btd",
        toeplitz_DTT,
        same_BTT,
        u.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
