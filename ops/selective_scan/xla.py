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

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments
from . import gating

WALKS_BACKWARDS = True


def _kept(keep_B, state_BND):
    """The state that reaches a token: zero where a segment starts, by a selection and not by a
    factor, so that what is not finite ends with its segment."""
    return state_BND if keep_B is None else jnp.where(keep_B[:, None, None], state_BND, 0.0)


class _Recurrence(NamedTuple):
    """The state equation h = a h + delta x B, and the direction of the walk over tokens."""

    A_ND: jax.Array
    eigenvalue_range: tuple[int, int]
    reverse: bool

    def factor(self, delta_BD):
        """a [B, N, D] and its derivative da/dw."""
        e = jnp.exp(delta_BD[:, None, :] * self.A_ND[None, :, :])
        return (e, e) if self.eigenvalue_range == (0, 1) else (2 * e - 1, 2 * e)

    def advance(self, h_BND, token):
        """The state after a token."""
        a, _ = self.factor(token.delta)
        h_BND = _kept(token.keep, h_BND)
        return a * h_BND + (token.delta * token.x)[:, None, :] * token.B[:, :, None]

    def walk(self, step, carry, inputs):
        """`lax.scan` over tokens or chunks in the order of the walk."""
        return lax.scan(step, carry, inputs, reverse=self.reverse)

    def walk_back(self, step, carry, inputs):
        """`lax.scan` over tokens or chunks from the end of the walk."""
        return lax.scan(step, carry, inputs, reverse=not self.reverse)


class _Tokens(NamedTuple):
    """The inputs of one token [B, D or N], of a chunk [C, B, ...] or of all chunks [G, C, B, ...],
    in float32."""

    x: Any
    delta: Any
    B: Any
    C: Any
    keep: Any  # [B] bool, whether the state reaches the token; None: all
    dy: Any = None


def _to_chunks(array, chunk, reverse, fill=0):
    """[G, C, B, ...] of [B, T, ...], time padded where the walk ends; with delta = 0 a padded token
    leaves the state alone."""
    if array is None:
        return None
    pad = -array.shape[1] % chunk
    padding = ((0, 0), (pad, 0) if reverse else (0, pad)) + ((0, 0),) * (array.ndim - 2)
    array = jnp.moveaxis(jnp.pad(array, padding, constant_values=fill), 0, 1)
    return array.reshape(-1, chunk, *array.shape[1:])


def _chunks(x, delta, B, C, segment_ids, chunk, reverse, dy=None) -> _Tokens:
    """The tokens of all chunks; padded ones continue the segment."""
    x, delta, B, C, dy = (_to_chunks(array, chunk, reverse) for array in (x, delta, B, C, dy))
    keep = _to_chunks(segments.continues(segment_ids, reverse=reverse), chunk, reverse, fill=1)
    return _Tokens(x, delta, B, C, keep, dy)


def _from_chunks(array_GCBX, length, reverse):
    """[B, T, X] of [G, C, B, X]."""
    array_TBX = array_GCBX.reshape(-1, *array_GCBX.shape[2:])
    array_TBX = array_TBX[-length:] if reverse else array_TBX[:length]
    return jnp.moveaxis(array_TBX, 0, 1)


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
    recurrence = _Recurrence(A_DN.T, eigenvalue_range, reverse)

    def step(h_BND, token):
        h_BND = recurrence.advance(h_BND, token)
        return h_BND, einsum("bnd,bn->bd", h_BND, token.C)

    def step_chunk(h_BND, tokens):
        last_BND, y_CBD = recurrence.walk(step, h_BND, tokens)
        return last_BND, (h_BND if keeps else None, y_CBD)

    tokens = _chunks(x_BTD, delta_BTD, B_BTN, C_BTN, segment_ids, chunk, reverse)
    state_BND, (starts_GBND, y_GCBD) = recurrence.walk(step_chunk, h_BDN.swapaxes(1, 2), tokens)
    y_BTD = _from_chunks(y_GCBD, x.shape[1], reverse)
    if D is not None:
        y_BTD = y_BTD + D.astype(jnp.float32)[None, None, :] * x_BTD
    if z is not None:
        y_BTD = gating.gate(y_BTD, z.astype(jnp.float32))
    starts = None if starts_GBND is None else jnp.swapaxes(starts_GBND, 0, 1)
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
    recurrence = _Recurrence(A_DN.T, eigenvalue_range, reverse)
    dy = per_y = dout.astype(jnp.float32)
    if z is not None:
        dy, per_y = gating.gate_gradients(z.astype(jnp.float32), dy)
    length = x.shape[1]
    # As few chunks of at most CHUNK tokens as there must be, of equal length unless their starts
    # are given.
    chunk = -(-length // -(-length // gating.CHUNK)) if starts is None else gating.CHUNK
    tokens = _chunks(x_BTD, delta_BTD, B_BTN, C_BTN, segment_ids, chunk, reverse, dy)
    h_BND = h_BDN.swapaxes(1, 2)
    if starts is not None:
        starts_GBND = jnp.swapaxes(starts, 0, 1)
    else:
        starts_GBND = h_BND[None] if length <= chunk else _chunk_starts(recurrence, h_BND, tokens)

    carry = (dfinal_state.swapaxes(1, 2), jnp.zeros_like(h_BND))
    retreat_chunk = functools.partial(_retreat_chunk, recurrence, with_y=z is not None)
    (dinitial_BND, dA_BND), of_tokens = recurrence.walk_back(
        retreat_chunk, carry, (tokens, starts_GBND)
    )
    dx, ddelta, dB, dC, y = (
        None if values is None else _from_chunks(values, length, reverse) for values in of_tokens
    )
    dD = None
    if D is not None:
        skip = D.astype(jnp.float32)[None, None, :]
        dx, dD = dx + skip * dy, (dy * x_BTD).sum((0, 1))  # Eq. 4
        y = None if y is None else y + skip * x_BTD
    dz = None if y is None else per_y * y
    ddelta, dbias = pull_delta(ddelta)
    dA = dA_BND.sum(0).T
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dinitial_BND.swapaxes(1, 2)


def _chunk_starts(recurrence: _Recurrence, h_BND, tokens: _Tokens):
    """The states before the chunks [G, B, N, D], by a walk over all tokens."""

    def step(h_BND, token):
        return recurrence.advance(h_BND, token), None

    def step_chunk(h_BND, tokens):
        return recurrence.walk(step, h_BND, tokens)[0], h_BND

    return recurrence.walk(step_chunk, h_BND, tokens)[1]


def _retreat_chunk(recurrence: _Recurrence, carry, chunk, *, with_y):
    """The carry (a g, the sum so far of dA) before a chunk, and dx, ddelta, dB, dC and y of its
    tokens, y if asked for; the state before the chunk is given."""
    tokens, start_BND = chunk

    def recompute(h_BND, token):  # dC and y need the state only
        next_BND = recurrence.advance(h_BND, token)
        dC_BN = einsum("bnd,bd->bn", next_BND, token.dy)  # Eq. 3
        y_BD = einsum("bnd,bn->bd", next_BND, token.C) if with_y else None
        return next_BND, (h_BND, dC_BN, y_BD)

    def retreat(carry, inputs):
        # a_{t+1} g_{t+1}; dA is summed over the batch once, at the end.
        (ag_BND, dA_BND), (token, before_BND) = carry, inputs
        a, da = recurrence.factor(token.delta)
        g_BND = ag_BND + token.C[:, :, None] * token.dy[:, None, :]  # Eq. 1
        dw_BND = g_BND * _kept(token.keep, before_BND) * da  # Eq. 2
        dwrite_BD = einsum("bnd,bn->bd", g_BND, token.B)
        dx_BD = token.delta * dwrite_BD  # Eq. 4, without D
        dB_BN = einsum("bnd,bd->bn", g_BND, token.delta * token.x)  # Eq. 3
        # Eq. 5
        ddelta_BD = token.x * dwrite_BD + (dw_BND * recurrence.A_ND[None, :, :]).sum(1)
        dA_BND = dA_BND + dw_BND * token.delta[:, None, :]  # Eq. 2
        return (_kept(token.keep, a * g_BND), dA_BND), (dx_BD, ddelta_BD, dB_BN)

    _, (before_CBND, dC_CBN, y_CBD) = recurrence.walk(recompute, start_BND, tokens)
    carry, of_tokens = recurrence.walk_back(retreat, carry, (tokens, before_CBND))
    return carry, (*of_tokens, dC_CBN, y_CBD)
