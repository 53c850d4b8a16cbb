"""Short convolution as W shifted multiply-adds of all tokens at once, in plain JAX on every
backend.

Letters: W taps, S = W - 1 + T the inputs with the W - 1 before the first token in front, z_BSD. Tap
i of output t reads input t + i:

    y_t  = sum_i w_i z_{t+i} m_{t,i}                                                           (1)
    dz_s = sum_i w_i dy_{s-i} m_{s-i,i}                                                        (2)
    dw_i = sum_bt z_{t+i} dy_t m_{t,i}                                                         (3)

m_{t,i} is 1 where the input and output t lie in one run of equal segment ids, else 0. With
`reverse` the W - 1 inputs lie behind the last token and the taps come in the opposite order, w_i
being that of input t + W - 1 - i. The backward
rule is written as shifts too (and not left to autodiff, whose residuals are W copies of the inputs
and whose transposed slices do not fuse on a CPU). A grouped `lax.conv_general_dilated` computes the
same; on a CPU it took 30 to 200 times as long.

There is no kernel for NVIDIA GPUs: XLA fuses the multiply-adds of the forward rule into one kernel
that reads x once and writes y once, as little as there can be; of the backward rule it makes two
that each read x and dy, 5/3 of the least bytes, which is 1.4 for both rules together (compiled
ahead of time, four taps; not measured)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments

WALKS_BACKWARDS = True
# More taps than this have their gradients in a loop: side by side, sums over all tokens that share
# their inputs took a CPU six times as long (17 taps), and each is a term to compile.
SIDE_BY_SIDE = 8


class _Places(NamedTuple):
    """Where z has what. before, last: the W - 1 inputs before the first token, and the last ones,
    both in the order of rows."""

    tokens: slice
    before: slice
    last: slice


def _places(taps, length, reverse):
    first_rows, last_rows = slice(0, taps - 1), slice(length, None)
    if reverse:
        return _Places(slice(0, length), last_rows, first_rows)
    return _Places(slice(taps - 1, None), first_rows, last_rows)


def _turned(x, axis, reverse):
    """A state [B, W - 1, D] or taps [W, D] in the order of rows from that of the walk, or back."""
    return jnp.flip(x, axis) if reverse else x


def _inputs(x, initial_state, reverse):
    """z_BSD in float32."""
    x, before = x.astype(jnp.float32), _turned(initial_state.astype(jnp.float32), 1, reverse)
    return jnp.concatenate([x, before] if reverse else [before, x], axis=1)


def _runs(segment_ids, taps, reverse):
    """[B, S] int32: the number of the segment that an input belongs to, None for one segment."""
    if segment_ids is None:
        return None
    # The inputs before the first token are in its segment.
    beside = (0, taps - 1) if reverse else (taps - 1, 0)
    return jnp.pad(segments.numbers(segment_ids), ((0, 0), beside), mode="edge")


def _keep(array_BXD, runs_BX, runs):
    """The array, zero where the two numbers of segments differ."""
    return (
        array_BXD if runs_BX is None else jnp.where((runs_BX == runs)[:, :, None], array_BXD, 0.0)
    )


def _slice(runs_BS, rows):
    return None if runs_BS is None else runs_BS[:, rows]


def _last(runs_BT, reverse):
    return _slice(runs_BT, slice(0, 1) if reverse else slice(-1, None))


def forward(x, w, initial_state, segment_ids, *, reverse=False):
    """y in float32 and the final state; shapes as in `api.py`."""
    (taps, _), length = w.shape, x.shape[1]
    z_BSD, w_WD = _inputs(x, initial_state, reverse), _turned(w.astype(jnp.float32), 0, reverse)
    runs_BS, places = _runs(segment_ids, taps, reverse), _places(taps, length, reverse)
    runs_BT = _slice(runs_BS, places.tokens)
    y_BTD = jnp.zeros(x.shape, jnp.float32)
    for i in range(taps):
        rows = slice(i, i + length)
        z_BTD = _keep(z_BSD[:, rows], _slice(runs_BS, rows), runs_BT)
        y_BTD = y_BTD + w_WD[None, None, i, :] * z_BTD  # Eq. 1
    final = _keep(z_BSD[:, places.last], _slice(runs_BS, places.last), _last(runs_BT, reverse))
    return y_BTD, _turned(final, 1, reverse)


def backward(x, w, initial_state, segment_ids, dy, dfinal_state, *, reverse=False):
    """Gradients of x, w and initial_state, in float32."""
    (taps, _), (_, length, _) = w.shape, x.shape
    z_BSD, w_WD = _inputs(x, initial_state, reverse), _turned(w.astype(jnp.float32), 0, reverse)
    runs_BS, places = _runs(segment_ids, taps, reverse), _places(taps, length, reverse)
    runs_BT = _slice(runs_BS, places.tokens)
    around = ((0, 0), (taps - 1, taps - 1))
    dy_padded = jnp.pad(dy, (*around, (0, 0)))
    runs_padded = None if runs_BT is None else jnp.pad(runs_BT, around, constant_values=-1)

    dlast = _turned(dfinal_state, 1, reverse)
    dlast = _keep(dlast, _slice(runs_BS, places.last), _last(runs_BT, reverse))
    dz_BSD = jnp.pad(dlast, ((0, 0), (0, length) if reverse else (length, 0), (0, 0)))
    for i in range(taps):
        shifted = slice(taps - 1 - i, 2 * (taps - 1) - i + length)
        dy_BSD = _keep(dy_padded[:, shifted], _slice(runs_padded, shifted), runs_BS)
        dz_BSD = dz_BSD + w_WD[None, None, i, :] * dy_BSD  # Eq. 2

    def of_tap(i):
        rows = lax.dynamic_slice_in_dim(z_BSD, i, length, 1)
        runs = None if runs_BS is None else lax.dynamic_slice_in_dim(runs_BS, i, length, 1)
        return einsum("btd,btd->d", _keep(rows, runs, runs_BT), dy)  # Eq. 3

    few = taps <= SIDE_BY_SIDE
    dw_WD = jnp.stack([*map(of_tap, range(taps))]) if few else lax.map(of_tap, jnp.arange(taps))
    dw_WD = _turned(dw_WD, 0, reverse)
    return dz_BSD[:, places.tokens], dw_WD, _turned(dz_BSD[:, places.before], 1, reverse)
