"""Selective scan in plain JAX on every backend: token by token, with a backward pass that
recomputes states by chunks.

With h the state, w_t = delta_t A and a_t = exp(w_t) or 2 exp(w_t) - 1, the gradient g_t of h_t runs
from the end to the start:

    g_t      = C_t dy_t + a_{t+1} g_{t+1}                                                      (1)
    dw_t     = g_t h_{t-1} da_t/dw_t              dA   = sum_bt delta_t dw_t                   (2)
    dC_t     = sum_d h_t dy_t                     dB_t = sum_d g_t delta_t x_t                 (3)
    dx_t     = delta_t sum_n B_t g_t + D dy_t                                                  (4)
    ddelta_t = x_t sum_n B_t g_t + sum_n A dw_t                                                (5)

where da/dw = exp(w) or 2 exp(w), which is a or a + 1.

With a gate, out = y silu(z) and dy = silu(z) dout; y is recomputed with the states.

The states are kept at the starts of chunks only, by the forward pass if it is asked to, else by a
walk over the chunks; inside a chunk, last chunk first, they are recomputed. So one chunk's states
and one state per chunk exist at a time, and never an array of the size of all states. No factor is
ever divided by or taken to a logarithm, and no product of factors is formed: decays of any
strength, zero and negative factors are exact.

The work is elementwise on the state, so that on a CPU the sequential form costs the fewest passes
over memory (an associative scan inside the chunk takes about twice the time); on accelerators its
many small steps are what a kernel avoids. A state is [B, N, D] here: D, the large axis, is the
contiguous one. Letters: C chunk length, G number of chunks."""

import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments
from . import gating

WALKS_BACKWARDS = True


def _factor(delta_BD, A_ND, keep_B, eigenvalue_range):
    """The factor a [B, N, D] and its derivative da/dw; both zero where a segment starts."""
    e = jnp.exp(delta_BD[:, None, :] * A_ND[None, :, :])
    a, da = (e, e) if eigenvalue_range == (0, 1) else (2 * e - 1, 2 * e)
    if keep_B is not None:
        a, da = (jnp.where(keep_B[:, None, None], factor, 0.0) for factor in (a, da))
    return a, da


def _write(x_BD, delta_BD, B_BN):
    """delta x B [B, N, D]."""
    return (delta_BD * x_BD)[:, None, :] * B_BN[:, :, None]


def _to_chunks(array, chunk, reverse, fill=0):
    """[B, T, ...] -> [G, C, B, ...], time padded where the walk ends; with delta = 0 a padded token
    leaves the state alone."""
    pad = -array.shape[1] % chunk
    padding = ((0, 0), (pad, 0) if reverse else (0, pad)) + ((0, 0),) * (array.ndim - 2)
    array = jnp.moveaxis(jnp.pad(array, padding, constant_values=fill), 0, 1)
    return array.reshape(-1, chunk, *array.shape[1:])


def _keep_chunks(segment_ids, chunk, reverse):
    """Whether a token continues a segment [G, C, B]; padded ones do."""
    keep_BT = segments.continues(segment_ids, reverse=reverse)
    return None if keep_BT is None else _to_chunks(keep_BT, chunk, reverse, fill=True)


def _from_chunks(array_GCBX, length, reverse):
    """[G, C, B, X] -> [B, T, X]."""
    array_TBX = array_GCBX.reshape(-1, *array_GCBX.shape[2:])
    array_TBX = array_TBX[-length:] if reverse else array_TBX[:length]
    return jnp.moveaxis(array_TBX, 0, 1)


def _walking_order(states_GBND, reverse):
    """States at the starts of chunks, the first of the walk first, from their order in time; and
    back."""
    return states_GBND[::-1] if reverse else states_GBND


def _cast(*arrays):
    return tuple(array.astype(jnp.float32) for array in arrays)


def forward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    *,
    delta_softplus,
    eigenvalue_range,
    with_chunk_states=False,
    reverse=False,
):
    """y in float32, the final state, and the states at the starts of chunks (`gating.py`) or None;
    shapes as in `api.py`."""
    delta = gating.step_sizes(delta, bias, delta_softplus)
    keeps = with_chunk_states and gating.keeps_chunk_states(x, A)
    chunk = gating.CHUNK if keeps else x.shape[1]
    x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, h_BDN = _cast(x, delta, A, B, C, initial_state)
    A_ND = A_DN.T

    def step(h_BND, token):
        x_BD, delta_BD, B_BN, C_BN, keep_B = token
        a, _ = _factor(delta_BD, A_ND, keep_B, eigenvalue_range)
        h_BND = a * h_BND + _write(x_BD, delta_BD, B_BN)
        return h_BND, einsum("bnd,bn->bd", h_BND, C_BN)

    def step_chunk(h_BND, tokens):
        last_BND, y_CBD = lax.scan(step, h_BND, tokens, reverse=reverse)
        return last_BND, (h_BND if keeps else None, y_CBD)

    chunks = (
        *(_to_chunks(array, chunk, reverse) for array in (x_BTD, delta_BTD, B_BTN, C_BTN)),
        _keep_chunks(segment_ids, chunk, reverse),
    )
    state_BND, (starts_GBND, y_GCBD) = lax.scan(
        step_chunk, h_BDN.swapaxes(1, 2), chunks, reverse=reverse
    )
    y_BTD = _from_chunks(y_GCBD, x.shape[1], reverse)
    if D is not None:
        y_BTD = y_BTD + D.astype(jnp.float32)[None, None, :] * x_BTD
    if z is not None:
        y_BTD = gating.gate(y_BTD, z.astype(jnp.float32))
    starts = None
    if starts_GBND is not None:
        starts = jnp.swapaxes(_walking_order(starts_GBND, reverse), 0, 1)
    return y_BTD, state_BND.swapaxes(1, 2), starts


def backward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    starts,
    dout,
    dfinal_state,
    *,
    delta_softplus,
    eigenvalue_range,
    reverse=False,
):
    """Gradients of x, delta, A, B, C, D, z, bias (of these three None where they are) and
    initial_state, in float32; starts: what `forward` left, or None."""
    delta, pull_delta = gating.step_sizes_vjp(delta, bias, delta_softplus)
    x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, h_BDN = _cast(x, delta, A, B, C, initial_state)
    dy = per_y = dout.astype(jnp.float32)
    if z is not None:
        dy, per_y = gating.gate_gradients(z.astype(jnp.float32), dy)
    length = x.shape[1]
    # As few chunks of at most CHUNK tokens as there must be, of equal length unless their starts
    # are given.
    chunk = -(-length // -(-length // gating.CHUNK)) if starts is None else gating.CHUNK
    A_ND, h_BND = A_DN.T, h_BDN.swapaxes(1, 2)
    x_GCBD, delta_GCBD, B_GCBN, C_GCBN, dy_GCBD = (
        _to_chunks(z, chunk, reverse) for z in (x_BTD, delta_BTD, B_BTN, C_BTN, dy)
    )
    keep_GCB = _keep_chunks(segment_ids, chunk, reverse)

    def advance(h_BND, token):
        x_BD, delta_BD, B_BN, keep_B = token
        a, _ = _factor(delta_BD, A_ND, keep_B, eigenvalue_range)
        return a * h_BND + _write(x_BD, delta_BD, B_BN)

    def skip_chunk(h_BND, tokens):
        last_BND, _ = lax.scan(
            lambda h, token: (advance(h, token), None), h_BND, tokens, reverse=reverse
        )
        return last_BND, h_BND

    def recompute(h_BND, token):  # dC and y need the state only
        C_BN, dy_BD, *token = token
        next_BND = advance(h_BND, token)
        dC_BN = einsum("bnd,bd->bn", next_BND, dy_BD)  # Eq. 3
        y_BD = None if z is None else einsum("bnd,bn->bd", next_BND, C_BN)
        return next_BND, (h_BND, dC_BN, y_BD)

    def retreat(carry, token):
        # a_{t+1} g_{t+1}; dA is summed over the batch once, at the end.
        ag_BND, dA_BND = carry
        x_BD, delta_BD, B_BN, C_BN, dy_BD, keep_B, before_BND = token
        a, da = _factor(delta_BD, A_ND, keep_B, eigenvalue_range)
        g_BND = ag_BND + C_BN[:, :, None] * dy_BD[:, None, :]  # Eq. 1
        dw_BND = g_BND * before_BND * da  # Eq. 2
        dwrite_BD = einsum("bnd,bn->bd", g_BND, B_BN)
        dB_BN = einsum("bnd,bd->bn", g_BND, delta_BD * x_BD)  # Eq. 3
        ddelta_BD = x_BD * dwrite_BD + (dw_BND * A_ND[None, :, :]).sum(1)  # Eq. 5
        return (a * g_BND, dA_BND + dw_BND * delta_BD[:, None, :]), (
            delta_BD * dwrite_BD,
            ddelta_BD,
            dB_BN,
        )

    def retreat_chunk(carry, chunk):
        x_CBD, delta_CBD, B_CBN, C_CBN, dy_CBD, keep_CB, start_BND = chunk
        _, (before_CBND, dC_CBN, y_CBD) = lax.scan(
            recompute, start_BND, (C_CBN, dy_CBD, x_CBD, delta_CBD, B_CBN, keep_CB), reverse=reverse
        )
        tokens = (x_CBD, delta_CBD, B_CBN, C_CBN, dy_CBD, keep_CB, before_CBND)
        carry, (dx_CBD, ddelta_CBD, dB_CBN) = lax.scan(retreat, carry, tokens, reverse=not reverse)
        return carry, (dx_CBD, ddelta_CBD, dB_CBN, dC_CBN, y_CBD)

    if starts is not None:
        starts_GBND = _walking_order(jnp.swapaxes(starts, 0, 1), reverse)
    elif length <= chunk:
        starts_GBND = h_BND[None]
    else:
        _, starts_GBND = lax.scan(
            skip_chunk, h_BND, (x_GCBD, delta_GCBD, B_GCBN, keep_GCB), reverse=reverse
        )
    carry = (dfinal_state.swapaxes(1, 2), jnp.zeros_like(h_BND))
    chunks = (x_GCBD, delta_GCBD, B_GCBN, C_GCBN, dy_GCBD, keep_GCB, starts_GBND)
    (dinitial_BND, dA_BND), of_tokens = lax.scan(retreat_chunk, carry, chunks, reverse=not reverse)

    dx, ddelta, dB, dC, y = (
        None if values is None else _from_chunks(values, length, reverse) for values in of_tokens
    )
    dD = None
    if D is not None:
        skip = D.astype(jnp.float32)[None, None, :]
        dx, dD = dx + skip * dy, (dy * x_BTD).sum((0, 1))
        y = None if y is None else y + skip * x_BTD
    dz = None if y is None else per_y * y
    dA = dA_BND.sum(0).T
    ddelta, dbias = pull_delta(ddelta)
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_BND.swapaxes(1, 2)
