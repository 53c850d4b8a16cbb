"""The short convolution with time cut over devices: each hands its last W - 1 inputs to the next.

Backward it receives from there the gradient of these inputs, which the next device has from its
first W - 1 outputs alone."""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..framework import segments
from ..framework.sequence_parallel import CARRIED, Line


def _tail(x, segment_ids, taps):
    """The state that these inputs leave [B, W - 1, D]."""
    keep_BT = segments.reaches_end(segment_ids)
    x = x if keep_BT is None else jnp.where(keep_BT[..., None], x, 0)
    return x[:, x.shape[1] - (taps - 1) :].astype(jnp.float32)


def _kept(keep_B, x):
    return x if keep_B is None else jnp.where(keep_B[:, None, None], x, 0)


class OverTime:
    def forward(self, local, line: Line, x, w, initial_state, segment_ids):
        taps = w.shape[0]
        if x.shape[1] < taps - 1:
            raise ValueError(
                f"short_convolution of W={taps} taps needs at least W - 1 tokens on each"
                f" of the {line.size} devices along time; got {x.shape[1]}"
            )
        entered, tail = line.entered(segment_ids), _tail(x, segment_ids, taps)
        before = jnp.where(line.rank == 0, initial_state, line.shift(tail))
        before, entered = checkpoint_name((_kept(entered, before), entered), CARRIED)
        y, _ = local.forward(x, w, before, segment_ids)
        final = line.from_device(tail, line.size - 1)
        return (y, final), (before, entered)

    def backward(self, local, line: Line, carried, inputs, cotangents):
        (x, w, initial_state, segment_ids), (dy, dfinal) = inputs, cotangents
        (before, entered), halo = carried, w.shape[0] - 1
        if not halo:
            return local.backward((x, w, before, segment_ids), (dy, dfinal))
        ids = None if segment_ids is None else segment_ids[:, :halo]
        *_, dbefore = local.backward(
            (x[:, :halo], w, before, ids), (dy[:, :halo], jnp.zeros_like(dfinal))
        )
        dbefore = _kept(entered, dbefore)
        dtail = jnp.where(line.rank == line.size - 1, dfinal, line.shift(dbefore, by=-1))
        dx, dw, _ = local.backward((x, w, before, segment_ids), (dy, dtail))
        return dx, dw, line.from_device(dbefore, 0).astype(initial_state.dtype)


OVER_TIME = OverTime()
