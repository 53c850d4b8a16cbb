"""The selective scan with time cut over devices: what `ops/framework/sequence_parallel.py` asks of
an op.

What a token reads from the state before the device, C_t times the product of the factors up to t,
is D x N numbers per token and is never formed: the op runs from a zero state for the state that it
leaves, and again from the state that came in; backward likewise. The product of all factors is
exp(A sum_t delta_t), or what the op makes of ones without input where factors are not exponentials.
"""

import jax.numpy as jnp

from ..framework import segments
from ..framework.sequence_parallel import Affine
from .gating import step_sizes


def _transition(rules, x, delta, A, B, C, bias, segment_ids):
    batch, _, channels = x.shape
    if rules.static["eigenvalue_range"] == (0, 1):
        steps = step_sizes(delta, bias, rules.static["delta_softplus"])
        total_BD = jnp.sum(steps.astype(jnp.float32), axis=1)
        factor_BDN = jnp.exp(total_BD[:, :, None] * A.astype(jnp.float32)[None])
        keep = segments.reaches_start(segment_ids)
        return factor_BDN if keep is None else jnp.where(keep[:, -1, None, None], factor_BDN, 0)
    ones = jnp.ones((batch, channels, A.shape[1]), jnp.float32)
    nothing = jnp.zeros_like(x)
    inputs = nothing, delta, A, B, C, None, None, bias, ones, segment_ids
    return rules.forward(*inputs)[1]


def summary(rules, x, delta, A, B, C, D, z, bias, segment_ids):
    zero = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    _, M = rules.forward(x, delta, A, B, C, None, None, bias, zero, segment_ids)

    def read(S):
        inputs = x, delta, A, B, C, D, z, bias, S, segment_ids
        (y, _), chunk_states = rules.forward_and_chunk_states(*inputs)
        return y, chunk_states

    return _transition(rules, x, delta, A, B, C, bias, segment_ids), M, read


def adjoint(rules, x, delta, A, B, C, D, z, bias, S, segment_ids, dout):
    inputs = x, delta, A, B, C, D, z, bias, S, segment_ids
    dS = rules.backward(inputs, (dout, jnp.zeros_like(S)))[-1]
    return _transition(rules, x, delta, A, B, C, bias, segment_ids), dS


RULES = Affine(summary, adjoint, jnp.multiply, jnp.multiply, split=True)
