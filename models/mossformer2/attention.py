"""Squared-relu attention within groups of tokens, the quadratic part of MossFormer's attention."""

import jax
import jax.numpy as jnp

from models.parts.positions import token_positions


def positions_and_groups(
    x_BTD: jax.Array, number_BT: jax.Array | None, given_BT: jax.Array | None, group: int
) -> tuple[jax.Array, jax.Array | None]:
    """Positions [B, T] in their segments, the given ones if there are, and the number of each
    token's group [B, T], which does not decrease; None where groups are of the whole sequence."""
    batch, length, _ = x_BTD.shape
    zero_B = jnp.zeros(batch, jnp.int32)
    counted_BT = token_positions(None, zero_B, length, number_BT)
    position_BT = counted_BT if given_BT is None else given_BT
    if number_BT is None:
        return position_BT, None
    return position_BT, jnp.cumsum(counted_BT % group == 0, axis=1, dtype=jnp.int32)


def squared_relu_attention(
    q_BTK: jax.Array, k_BTK: jax.Array, v_BTV: jax.Array, *, group: int, group_BT: jax.Array | None
) -> jax.Array:
    """o_t = sum over s in the group of t of relu(q_t k_s / group)^2 v_s, [B, T, V] in v's dtype.

    group_BT: runs of at most `group` equal numbers, of tokens that read each other; None: the
    blocks of `group` tokens from the first on. The scores are float32."""
    batch, length, _ = v_BTV.shape
    block = min(group, length)
    pad = -length % block

    def blocks(x_BTK: jax.Array, filler: int = 0) -> jax.Array:
        around = ((0, 0), (0, pad)) + ((0, 0),) * (x_BTK.ndim - 2)
        padded = jnp.pad(x_BTK, around, constant_values=filler)
        return padded.reshape(batch, -1, block, *x_BTK.shape[2:])

    q, k, v = blocks(q_BTK), blocks(k_BTK), blocks(v_BTV)
    count = q.shape[1]

    def beside(x: jax.Array, filler: int = 0) -> jax.Array:
        """[B, G, 3 block, ...]: of each block the one before, itself and the one after."""
        ends = jnp.pad(x, ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 2), constant_values=filler)
        return jnp.concatenate([ends[:, i : i + count] for i in range(3)], axis=2)

    several = group_BT is not None and count > 1
    k, v = (beside(k), beside(v)) if several else (k, v)
    scores = jnp.einsum("bgqk,bgsk->bgqs", q, k, preferred_element_type=jnp.float32) / group
    weights = jnp.square(jax.nn.relu(scores))
    if group_BT is not None:
        of_query = blocks(group_BT, -1)
        of_key = beside(of_query, -2) if several else of_query
        weights = jnp.where(of_query[..., :, None] == of_key[..., None, :], weights, 0.0)
    o = jnp.einsum("bgqs,bgsv->bgqv", weights.astype(v.dtype), v)
    return o.reshape(batch, count * block, -1)[:, :length]
