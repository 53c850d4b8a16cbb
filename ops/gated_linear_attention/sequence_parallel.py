"""Gated linear attention with time cut over devices, by the rules of
`ops/framework/sequence_parallel.py`.

With prefix_t, suffix_t, total the products of the decays of a device's tokens up to t, after t, and
of all, its tokens map the state S before them by

    A = Diag(total)        M = sum_t (k_t . suffix_t)^T v_t        E_t = scale q_t . prefix_t

None of the three needs the recurrence, so that M travels while the device computes its outputs from
a zero state. The products are exponentials of sums of logs over the interval, all <= 0: the error
of such a sum is relative to it, and that of its exponential absolute."""

import jax.numpy as jnp
from jax import lax

from ..chunks import chunking
from ..chunks.chunking import einsum
from ..framework import segments
from ..framework.sequence_parallel import Affine, segment_states


def _prefix_log(decay_log, length, reverse):
    """[B or 1, T, H, K or 1]: the sum of logs up to each token, itself included."""
    g = decay_log.astype(jnp.float32)
    if g.ndim == 1:
        tokens = jnp.arange(length, 0, -1) if reverse else jnp.arange(1, length + 1)
        return tokens[None, :, None, None] * g[None, None, :, None]
    return lax.cumsum(g if g.ndim == 4 else g[..., None], axis=1, reverse=reverse)


def _suffix_log(decay_log, length, reverse):
    """[B or 1, T, H, K or 1]: the sum of logs after each token."""
    if decay_log.ndim == 1:
        after = jnp.arange(length) if reverse else jnp.arange(length - 1, -1, -1)
        return after[None, :, None, None] * decay_log.astype(jnp.float32)[None, None, :, None]
    g, beside = (decay_log[:, :-1], (1, 0)) if reverse else (decay_log[:, 1:], (0, 1))
    of_next = jnp.pad(g, ((0, 0), beside) + ((0, 0),) * (g.ndim - 2))
    return _prefix_log(of_next, length, not reverse)


def _weighted(x_BTHK, log, keep_BT):
    """x . exp(log) in float32, zero where `keep_BT` is false; None for no logs, for all kept."""
    x_BTHK = x_BTHK.astype(jnp.float32)
    if log is not None:
        x_BTHK = x_BTHK * jnp.exp(log)
    return x_BTHK if keep_BT is None else jnp.where(keep_BT[..., None, None], x_BTHK, 0)


def _transition(prefix_log, keep_BT, batch, heads, reverse):
    """A [B, H, K or 1, 1]."""
    one = jnp.ones((batch, 1, heads, 1), jnp.float32)
    at_last = slice(0, 1) if reverse else slice(-1, None)
    last = None if prefix_log is None else prefix_log[:, at_last]
    keep = None if keep_BT is None else keep_BT[:, at_last]
    return jnp.swapaxes(_weighted(one, last, keep), 1, 2).swapaxes(2, 3)


def _queries(rules, q, decay_log, segment_ids, heads):
    """E [B, T, H, K] and A."""
    (batch, length), reverse = q.shape[:2], rules.reverse
    log = None if decay_log is None else _prefix_log(decay_log, length, reverse)
    keep = segments.reaches_start(segment_ids, reverse=reverse)
    q = rules.static["scale"] * chunking.repeat_heads(q, heads)
    return _weighted(q, log, keep), _transition(log, keep, batch, heads, reverse)


def summary(rules, q, k, v, decay_log, segment_ids):
    """A, M [B, H, K, V], and the outputs as a function of the state before."""
    batch, length, heads, value_size = v.shape
    E, A = _queries(rules, q, decay_log, segment_ids, heads)
    k_end = _weighted(
        chunking.repeat_heads(k, heads),
        None if decay_log is None else _suffix_log(decay_log, length, rules.reverse),
        segments.reaches_end(segment_ids, reverse=rules.reverse),
    )
    M = einsum("bthk,bthv->bhkv", k_end, v.astype(jnp.float32))
    zero = jnp.zeros((batch, heads, k.shape[-1], value_size), jnp.float32)
    o, _ = rules.forward(q, k, v, decay_log, zero, segment_ids)

    def read(S):
        return (o + einsum("bthk,bhkv->bthv", E, S)).astype(o.dtype), None

    return A, M, read


def adjoint(rules, q, k, v, decay_log, S, segment_ids, do):
    """A, and E^T do [B, H, K, V]."""
    del k, S
    E, A = _queries(rules, q, decay_log, segment_ids, v.shape[2])
    return A, einsum("bthk,bthv->bhkv", E, do.astype(jnp.float32))


RULES = Affine(summary, adjoint, jnp.multiply, jnp.multiply, split=False)


def _segment_transition(rules, q, k, v, decay_log, segment_ids):
    """A of each segment [B, S, H, K or 1, 1]."""
    del q, k
    (batch, length, heads, _), count = v.shape, rules.static["num_segments"]
    member = segment_ids[..., None] == jnp.arange(count)[None, None]
    if decay_log is None:
        g = jnp.zeros((batch, length, heads, 1), jnp.float32)
    elif decay_log.ndim == 1:
        g = jnp.broadcast_to(decay_log[None, None, :, None], (batch, length, heads, 1))
    else:
        g = decay_log if decay_log.ndim == 4 else decay_log[..., None]
    log = einsum("bts,bthk->bshk", member.astype(jnp.float32), g.astype(jnp.float32))
    return jnp.exp(log)[..., None]


SEGMENT_RULES = segment_states(_segment_transition, jnp.multiply, jnp.multiply)
