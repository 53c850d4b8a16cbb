"""Long convolution as a sum over all earlier tokens in float32: the definition that every other
implementation is held to."""

import jax.numpy as jnp
from jax import lax


def long_convolution(u, kernel):
    """y_t = sum_{s <= t} kernel_{t-s} u_s, by the lower-triangular Toeplitz matrix of every
    channel.

    Shapes as in `api.py`; returns y [B, T, D] in float32.
    """
    lag_TT = jnp.arange(u.shape[1])[:, None] - jnp.arange(u.shape[1])[None, :]
    toeplitz_DTT = jnp.where(
        (lag_TT >= 0)[None], kernel.astype(jnp.float32)[:, jnp.abs(lag_TT)], 0.0
    )
    return jnp.einsum(
        "dts,bsd->btd", toeplitz_DTT, u.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
