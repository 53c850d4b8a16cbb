"""The delta rule with time cut over devices, by the rules of `ops/framework/sequence_parallel.py`.

The transition A of a device's tokens is a K x K matrix. The op itself computes it, and E, from the
identity as the initial state and v = 0: the outputs are then E_t I = E_t and the final state is
A I = A. Forward, this run and the one for M are one, with the columns of values and of the identity
side by side."""

import jax.numpy as jnp

from ..chunks.chunking import einsum
from ..framework.sequence_parallel import Affine, segment_states

# The widest value that kernels take; beyond, the two runs are two calls.
WIDEST_VALUE = 256


def _identity(rules, batch, heads, key_size):
    """The identity [B, H, K, K] or, with `num_segments`, [B, S, H, K, K]."""
    segments = rules.static.get("num_segments")
    states = (batch, heads) if segments is None else (batch, segments, heads)
    return jnp.broadcast_to(jnp.eye(key_size), (*states, key_size, key_size))


def _response(rules, q, k, v, beta, decay_log, segment_ids):
    """E [B, T, H, K], and A of the shape of `_identity`."""
    batch, length, heads, _ = v.shape
    zero = jnp.zeros((batch, length, heads, k.shape[-1]), v.dtype)
    identity = _identity(rules, batch, heads, k.shape[-1])
    return rules.forward(q, k, zero, beta, decay_log, identity, segment_ids)


def _transition(*inputs):
    return _response(*inputs)[1]


def summary(rules, q, k, v, beta, decay_log, segment_ids):
    """A [B, H, K, K], M [B, H, K, V], and the outputs as a function of the state before."""
    (batch, length, heads, value_size), key_size = v.shape, k.shape[-1]
    zero = jnp.zeros((batch, heads, key_size, value_size), jnp.float32)
    if value_size + key_size <= WIDEST_VALUE:
        beside = jnp.zeros((batch, length, heads, key_size), v.dtype)
        o, state = rules.forward(
            q,
            k,
            jnp.concatenate([v, beside], axis=-1),
            beta,
            decay_log,
            jnp.concatenate([zero, _identity(rules, batch, heads, key_size)], axis=-1),
            segment_ids,
        )
        (o, E), (M, A) = (jnp.split(x, [value_size], axis=-1) for x in (o, state))
    else:
        o, M = rules.forward(q, k, v, beta, decay_log, zero, segment_ids)
        E, A = _response(rules, q, k, v, beta, decay_log, segment_ids)

    def read(S):
        return (o + _apply(E, S)).astype(v.dtype), None

    return A, M, read


def _apply(E, S):
    return einsum("bthk,bhkv->bthv", E.astype(jnp.float32), S)


def adjoint(rules, q, k, v, beta, decay_log, S, segment_ids, do):
    """A, and E^T do [B, H, K, V]."""
    del S
    E, A = _response(rules, q, k, v, beta, decay_log, segment_ids)
    E, do = E.astype(jnp.float32), do.astype(jnp.float32)
    return A, einsum("bthk,bthv->bhkv", E, do)


def act(A, S):
    return einsum("...kc,...cv->...kv", A, S)


def act_transposed(A, dS):
    return einsum("...ck,...cv->...kv", A, dS)


RULES = Affine(summary, adjoint, act, act_transposed, split=False)
SEGMENT_RULES = segment_states(_transition, act, act_transposed)
