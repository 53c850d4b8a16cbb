"""Diagonal scan, one token after another in float32: the definition that every other implementation
is held to."""

import jax
import jax.numpy as jnp
from jax import lax


def diagonal_scan(a, b, initial_state, segment_ids, reverse=False):
    """h_t = a_t h_{t-1} + b_t, in complex64 where the tuples a, b and initial_state hold two parts.

    Shapes as in `api.py`, each argument a tuple of its parts. Returns h [B, T, N] and the final
    state as such tuples."""
    a, b_BTN, h_BN = (_number(parts) for parts in (a, b, initial_state))
    a_BTN = jnp.broadcast_to(a[None, None, :], b_BTN.shape) if a.ndim == 1 else a
    if segment_ids is None:
        keep_BT = jnp.ones(b_BTN.shape[:2], bool)
    else:  # the first token continues the initial state
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        first = (0, 1) if reverse else (1, 0)
        keep_BT = jnp.pad(same, ((0, 0), first), constant_values=True)

    def step(h_BN, token):
        a_BN, b_BN, keep_B = token
        h_BN = a_BN * jnp.where(keep_B[:, None], h_BN, 0) + b_BN
        return h_BN, h_BN

    tokens = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (a_BTN, b_BTN, keep_BT))
    final_BN, h_TBN = lax.scan(step, h_BN, tokens, reverse=reverse)
    return _parts(jnp.moveaxis(h_TBN, 0, 1)), _parts(final_BN)


def _number(parts):
    parts = [part.astype(jnp.float32) for part in parts]
    return lax.complex(*parts) if len(parts) == 2 else parts[0]


def _parts(number):
    return (number.real, number.imag) if jnp.iscomplexobj(number) else (number,)
