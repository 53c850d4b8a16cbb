"""The selective scan with time cut over devices, by the rules of
`ops/framework/sequence_parallel.py`.

E_t, which is C_t times the product of the factors up to t, would be D x N numbers per token and is
never formed. The op runs twice instead: from a zero state for the state M that it leaves, then from
the state that came in; backward likewise. The transition is the product of all factors, exp(A sum_t
delta_t). Where factors are not exponentials, it is the final state of the op from ones without
input."""

import jax.numpy as jnp

from ..framework import segments
from ..framework.sequence_parallel import Affine
from .gating import step_sizes


def _transition(rules, x, delta, A, B, C, bias, segment_ids):
    """The transition [B, D, N]."""
    batch, _, channels = x.shape
    if rules.static["eigenvalue_range"] == (0, 1):
        steps = step_sizes(delta, bias, rules.static["delta_softplus"])
        total_BD = jnp.sum(steps.astype(jnp.float32), axis=1)
        factor_BDN = jnp.exp(total_BD[:, :, None] * A.astype(jnp.float32)[None])
        keep = segments.reaches_start(segment_ids, reverse=rules.reverse)
        if keep is None:
            return factor_BDN
        last = 0 if rules.reverse else -1
        return jnp.where(keep[:, last, None, None], factor_BDN, 0)
    ones = jnp.ones((batch, channels, A.shape[1]), jnp.float32)
    nothing = jnp.zeros_like(x)
    inputs = nothing, delta, A, B, C, None, None, bias, ones, segment_ids
    return rules.forward(*inputs)[1]


def summary(rules, x, delta, A, B, C, D, z, bias, segment_ids):
    """The transition, M [B, D, N], and the outputs as a function of the state before."""
    zero = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    _, M = rules.forward(x, delta, A, B, C, None, None, bias, zero, segment_ids)

    def read(S):
        inputs = x, delta, A, B, C, D, z, bias, S, segment_ids
        (y, _), chunk_states = rules.forward_and_chunk_states(*inputs)
        return y, chunk_states

    return _transition(rules, x, delta, A, B, C, bias, segment_ids), M, read


def adjoint(rules, x, delta, A, B, C, D, z, bias, S, segment_ids, dout):
    """The transition, and E^T dout [B, D, N]."""
    inputs = x, delta, A, B, C, D, z, bias, S, segment_ids
    dS = rules.backward(inputs, (dout, jnp.zeros_like(S)))[-1]
    return _transition(rules, x, delta, A, B, C, bias, segment_ids), dS


RULES = Affine(summary, adjoint, jnp.multiply, jnp.multiply, split=True)
