"""Short convolution as W shifted multiply-adds of all tokens at once, in plain JAX on every
backend.

Letters: W taps, S = W - 1 + T the inputs with the W - 1 before the first token in front, z_BSD. Tap
i of output t reads input t + i:

    y_t  = sum_i w_i z_{t+i} m_{t,i}                                                           (1)
    dz_s = sum_i w_i dy_{s-i} m_{s-i,i}                                                        (2)
    dw_i = sum_bt z_{t+i} dy_t m_{t,i}                                                         (3)

m_{t,i} is 1 where the input and output t lie in one run of equal segment ids, else 0. The backward
rule is written as shifts too (and not left to autodiff, whose residuals are W copies of the inputs
and whose transposed slices do not fuse on a CPU). A grouped `lax.conv_general_dilated` computes the
same; on a CPU it took 30 to 200 times as long.

There is no kernel for NVIDIA GPUs: XLA fuses the multiply-adds of the forward rule into one kernel
that reads x once and writes y once, as little as there can be; of the backward rule it makes two
that each read x and dy, 5/3 of the least bytes, which is 1.4 for both rules together (compiled
ahead of time, four taps; not measured)."""

import jax.numpy as jnp

from ..chunks.chunking import einsum
from ..framework import segments


def _inputs(x, initial_state):
    """z_BSD in float32."""
    return jnp.concatenate([initial_state.astype(jnp.float32), x.astype(jnp.float32)], axis=1)


def _runs(segment_ids, taps):
    """[B, S] int32: the number of the segment that an input belongs to, None for one segment."""
    if segment_ids is None:
        return None
    # The inputs before the first token are in its segment, run 0.
    return jnp.pad(segments.numbers(segment_ids), ((0, 0), (taps - 1, 0)))


def _keep(array_BXD, runs_BX, runs):
    """The array, zero where the two numbers of segments differ."""
    return (
        array_BXD if runs_BX is None else jnp.where((runs_BX == runs)[:, :, None], array_BXD, 0.0)
    )


def _slice(runs_BS, start, length):
    return None if runs_BS is None else runs_BS[:, start : start + length]


def _last(runs_BS):
    return None if runs_BS is None else runs_BS[:, -1:]


def forward(x, w, initial_state, segment_ids):
    """y in float32 and the final state; shapes as in `api.py`."""
    (taps, _), length = w.shape, x.shape[1]
    z_BSD, w_WD = _inputs(x, initial_state), w.astype(jnp.float32)
    runs_BS = _runs(segment_ids, taps)
    runs_BT = _slice(runs_BS, taps - 1, length)
    y_BTD = jnp.zeros(x.shape, jnp.float32)
    for i in range(taps):
        z_BTD = _keep(z_BSD[:, i : i + length], _slice(runs_BS, i, length), runs_BT)
        y_BTD = y_BTD + w_WD[None, None, i, :] * z_BTD  # Eq. 1
    return y_BTD, _keep(z_BSD[:, length:], _slice(runs_BS, length, taps - 1), _last(runs_BS))


def backward(x, w, initial_state, segment_ids, dy, dfinal_state):
    """Gradients of x, w and initial_state, in float32."""
    (taps, _), (_, length, _) = w.shape, x.shape
    z_BSD, w_WD = _inputs(x, initial_state), w.astype(jnp.float32)
    runs_BS = _runs(segment_ids, taps)
    runs_BT = _slice(runs_BS, taps - 1, length)
    around = ((0, 0), (taps - 1, taps - 1))
    dy_padded = jnp.pad(dy, (*around, (0, 0)))
    runs_padded = None if runs_BT is None else jnp.pad(runs_BT, around, constant_values=-1)

    dstate = _keep(dfinal_state, _slice(runs_BS, length, taps - 1), _last(runs_BS))
    dz_BSD = jnp.pad(dstate, ((0, 0), (length, 0), (0, 0)))
    dw_D = []
    for i in range(taps):
        start, total = taps - 1 - i, length + taps - 1
        dy_BSD = _keep(
            dy_padded[:, start : start + total], _slice(runs_padded, start, total), runs_BS
        )
        dz_BSD = dz_BSD + w_WD[None, None, i, :] * dy_BSD  # Eq. 2
        z_BTD = _keep(z_BSD[:, i : i + length], _slice(runs_BS, i, length), runs_BT)
        dw_D.append(einsum("btd,btd->d", z_BTD, dy))  # Eq. 3
    return dz_BSD[:, taps - 1 :], jnp.stack(dw_D), dz_BSD[:, : taps - 1]
