"""State passing with its parts on several devices.

The transition over the n parts of a device is A^n, which every device knows: besides the state that
its parts write, a device sends at most whether they hand on what comes in. States travel as
[B, N, D], so that each column (last axis) has a state matrix of its own."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework.sequence_parallel import CARRIED, TimeAxis


def _act(transition, S_BND):
    """keep A^n S."""
    A_NND, keep_B1D = transition
    S_BND = jnp.einsum("nkd,bkd->bnd", A_NND, S_BND, precision=lax.Precision.HIGHEST)
    return S_BND if keep_B1D is None else keep_B1D * S_BND


def _act_transposed(transition, S_BND):
    """keep (A^n)^T S."""
    A_NND, keep_B1D = transition
    return _act((jnp.swapaxes(A_NND, 0, 1), keep_B1D), S_BND)


def _transition(A, written, keeps):
    """A^n of the n parts of this device [N, N, D], and keep [B, 1, D] (None: 1 everywhere).

    keep is 1 where all parts hand on what comes in."""
    batch, parts, systems, _ = written.shape
    with jax.default_matmul_precision("highest"):
        power_DNN = jnp.linalg.matrix_power(A.astype(jnp.float32), parts)
    keep_B1D = None
    if keeps is not None:
        keep_B = jnp.all(keeps, axis=1).astype(jnp.float32)
        keep_B1D = jnp.broadcast_to(keep_B[:, None, None], (batch, 1, systems))
    return jnp.moveaxis(power_DNN, 0, -1), keep_B1D


def _swapped(state):
    """[B, N, D] of a state [B, D, N], and back."""
    return jnp.swapaxes(state, 1, 2)


class Rules:
    def forward(self, rules, axis: TimeAxis, A, written, keeps, initial_state):
        """The states before this device's parts, and the last one of all; what came in.

        The last is kept for `backward`."""
        _, M = rules.forward(A, written, keeps, jnp.zeros_like(initial_state))
        power, keep = _transition(A, written, keeps)
        S, last = axis.prefix(
            _act, keep, _swapped(M), _swapped(initial_state), split=True, common=power
        )
        S = checkpoint_name(_swapped(S), CARRIED)
        before, _ = rules.forward(A, written, keeps, S)
        return (before, _swapped(last)), S

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of A, written, keeps (None) and initial_state."""
        A, written, keeps, initial_state = inputs
        S, (dbefore, dlast) = carried, cotangents
        inputs = A, written, keeps, S
        *_, dM = rules.backward(inputs, (dbefore, jnp.zeros_like(S)))
        power, keep = _transition(A, written, keeps)
        dS, dinitial = axis.suffix(
            _act_transposed, keep, _swapped(dM), _swapped(dlast), split=True, common=power
        )
        *gradients, _ = rules.backward(inputs, (dbefore, _swapped(dS)))
        return *gradients, _swapped(dinitial).astype(initial_state.dtype)


RULES = Rules()
