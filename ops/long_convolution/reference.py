"""Long convolution as a sum over all earlier tokens in float32: the definition that every other
implementation is held to."""

import jax.numpy as jnp
from jax import lax


def long_convolution(u, kernel, segment_ids):
    """y_t = sum of kernel_{t-s} u_s over the tokens s <= t of t's segment.

    By the lower-triangular Toeplitz matrix of every channel. Shapes as in `api.py`; returns y
    [B, T, D] in float32."""
    if kernel.ndim == 3:
        rows = [
            long_convolution(u[b : b + 1], kernel[b], segment_ids) for b in range(kernel.shape[0])
        ]
        return jnp.concatenate(rows)
    lag_TT = jnp.arange(u.shape[1])[:, None] - jnp.arange(u.shape[1])[None, :]
    toeplitz_DTT = jnp.where(
        (lag_TT >= 0)[None], kernel.astype(jnp.float32)[:, jnp.abs(lag_TT)], 0.0
    )
    number_BT = jnp.zeros(u.shape[:2], jnp.int32)
    if segment_ids is not None:  # ids may come back: a change is what counts
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        number_BT = jnp.pad(jnp.cumsum(changed, axis=1), ((0, 0), (1, 0)))
    u_BTD = u.astype(jnp.float32)

    def of_token(token):
        t, row_DT = token
        # Selected, not multiplied by zero: what is not finite stays in its segment.
        same_BT = number_BT == jnp.take(number_BT, t, axis=1)[:, None]
        seen_BTD = jnp.where(
            same_BT[..., None] & (jnp.arange(len(row_DT[0])) <= t)[None, :, None], u_BTD, 0.0
        )
        return jnp.einsum("ds,bsd->bd", row_DT, seen_BTD, precision=lax.Precision.HIGHEST)

    rows_TDT = jnp.moveaxis(toeplitz_DTT, 1, 0)
    y_TBD = lax.map(of_token, (jnp.arange(u.shape[1]), rows_TDT))
    return jnp.moveaxis(y_TBD, 0, 1)
