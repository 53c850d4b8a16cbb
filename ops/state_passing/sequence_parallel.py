"""State passing with its parts on several devices: what a device hands on is A to the number of its
parts.

States travel as [B, N, D], where each column has a state matrix of its own. All devices know A:
besides M, what is sent is at most whether the parts of a device hand on what comes in."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework.sequence_parallel import CARRIED, TimeAxis


def _act(transition, S_BND):
    A_NND, keep_B1D = transition
    S_BND = jnp.einsum("nkd,bkd->bnd", A_NND, S_BND, precision=lax.Precision.HIGHEST)
    return S_BND if keep_B1D is None else keep_B1D * S_BND


def _act_transposed(transition, S_BND):
    A_NND, keep_B1D = transition
    return _act((jnp.swapaxes(A_NND, 0, 1), keep_B1D), S_BND)


def _transition(A, written, keeps):
    """A over all parts of this device [N, N, D], and 1 where they hand on what comes in [B, 1, D];
    None: everywhere."""
    batch, parts, systems, _ = written.shape
    with jax.default_matmul_precision("highest"):
        power_DNN = jnp.linalg.matrix_power(A.astype(jnp.float32), parts)
    keep_B1D = None
    if keeps is not None:
        keep_B = jnp.all(keeps, axis=1).astype(jnp.float32)
        keep_B1D = jnp.broadcast_to(keep_B[:, None, None], (batch, 1, systems))
    return jnp.moveaxis(power_DNN, 0, -1), keep_B1D


def _turned(state):
    """[B, D, N] -> [B, N, D] and back."""
    return jnp.swapaxes(state, 1, 2)


class Rules:
    def forward(self, rules, axis: TimeAxis, A, written, keeps, initial_state):
        _, M = rules.forward(A, written, keeps, jnp.zeros_like(initial_state))
        power, keep = _transition(A, written, keeps)
        S, last = axis.prefix(
            _act, keep, _turned(M), _turned(initial_state), split=True, common=power
        )
        S = checkpoint_name(_turned(S), CARRIED)
        before, _ = rules.forward(A, written, keeps, S)
        return (before, _turned(last)), S

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        A, written, keeps, initial_state = inputs
        S, (dbefore, dlast) = carried, cotangents
        inputs = A, written, keeps, S
        *_, dM = rules.backward(inputs, (dbefore, jnp.zeros_like(S)))
        power, keep = _transition(A, written, keeps)
        dS, dinitial = axis.suffix(
            _act_transposed, keep, _turned(dM), _turned(dlast), split=True, common=power
        )
        *gradients, _ = rules.backward(inputs, (dbefore, _turned(dS)))
        return *gradients, _turned(dinitial).astype(initial_state.dtype)


RULES = Rules()
