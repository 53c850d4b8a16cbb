"""Diagonal scan in plain JAX on every backend: token by token.

Let dh_t be the gradient of h_t as an output (of the last token: plus that of the final state) and
g_t its gradient as a state, which runs from the end to the start; h_{t-1} is zero where a segment
starts:

    g_t     = dh_t + conj(a_{t+1}) g_{t+1}                                                     (1)
    da_t    = g_t conj(h_{t-1})        db_t = g_t                                              (2)
    dh_{-1} = conj(a_0) g_0                                                                    (3)

where the gradient of a pair of reals is written as the complex number of its two parts. The states
h are the op's own output, so that nothing is computed again and b is not needed. No factor is
divided by or taken to a logarithm and no product of factors is formed: zeros, ones and factors
above one are exact, and a state overflows only where the definition does.

The work is elementwise. On two CPU cores, complex, at (B, T, N) = (4, 1024, 128) and with 4096
channels, this scan over tokens takes a third to a sixth of the time of a scan over chunks with an
associative scan inside, and half of that of C steps on all chunks at once with carried products of
factors; it also compiles fastest. On accelerators its many small steps are what a kernel avoids.

A number is a tuple of one real array, or of two, real and imaginary part.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..framework import segments


def _times(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _conjugate(x):
    return (x[0], *(-part for part in x[1:]))


def _add(x, y):
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _where_kept(keep_B, x_BN):
    return x_BN if keep_B is None else tuple(jnp.where(keep_B[:, None], part, 0.0) for part in x_BN)


def _cast(*numbers):
    return tuple(tuple(part.astype(jnp.float32) for part in number) for number in numbers)


def _split_factor(a):
    """The factor of all tokens [1, N] or None, and the factor of each [B, T, N] or None."""
    return (tuple(part[None, :] for part in a), None) if a[0].ndim == 1 else (None, a)


def _time_first(arrays):
    """[B, T, ...] -> [T, B, ...], and back."""
    return jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), arrays)


WALKS_BACKWARDS = True


def forward(a, b, initial_state, segment_ids, *, reverse=False):
    """h and the final state in float32; shapes as in `api.py`, each number a tuple of its parts."""
    a, b_BTN, h_BN = _cast(a, b, initial_state)
    a_1N, a_BTN = _split_factor(a)

    def step(h_BN, token):
        a_BN, b_BN, keep_B = token
        h_BN = _add(_times(a_1N or a_BN, _where_kept(keep_B, h_BN)), b_BN)
        return h_BN, h_BN

    tokens = _time_first((a_BTN, b_BTN, segments.continues(segment_ids, reverse=reverse)))
    final_BN, h_TBN = lax.scan(step, h_BN, tokens, reverse=reverse)
    return _time_first(h_TBN), final_BN


def backward(a, h, initial_state, segment_ids, dh, dfinal_state, *, reverse=False):
    """Gradients of a, b and initial_state, tuples like them, in float32; h [B, T, N] are the
    states."""
    a, h_BTN, initial_BN, dh_BTN = _cast(a, h, initial_state, dh)
    a_1N, a_BTN = _split_factor(a)
    before_BTN = tuple(
        jnp.concatenate([part[:, 1:], first[:, None]], axis=1)
        if reverse
        else jnp.concatenate([first[:, None], part[:, :-1]], axis=1)
        for first, part in zip(initial_BN, h_BTN, strict=True)
    )

    def retreat(carry, token):
        # conj(a_{t+1}) g_{t+1}; the sum over time so far of the gradient of a constant factor.
        ag_BN, da_BN = carry
        a_BN, keep_B, before_BN, dh_BN = token
        g_BN = _add(dh_BN, ag_BN)  # Eq. 1
        da_token_BN = _times(g_BN, _conjugate(_where_kept(keep_B, before_BN)))  # Eq. 2
        ag_BN = _where_kept(keep_B, _times(_conjugate(a_1N or a_BN), g_BN))
        if a_1N is None:
            return (ag_BN, None), (da_token_BN, g_BN)
        return (ag_BN, _add(da_BN, da_token_BN)), (None, g_BN)

    # The final state is the h of the last token of the walk.
    dh_BTN = tuple(
        part.at[:, 0 if reverse else -1].add(last)
        for part, last in zip(dh_BTN, dfinal_state, strict=True)
    )
    zeros_BN = tuple(jnp.zeros_like(part) for part in initial_BN)
    (dinitial_BN, da_BN), (da_TBN, g_TBN) = lax.scan(
        retreat,
        (zeros_BN, None if a_1N is None else zeros_BN),
        _time_first((a_BTN, segments.continues(segment_ids, reverse=reverse), before_BTN, dh_BTN)),
        reverse=not reverse,
    )
    if da_BN is None:
        return _time_first(da_TBN), _time_first(g_TBN), dinitial_BN
    return tuple(part.sum(0) for part in da_BN), _time_first(g_TBN), dinitial_BN
