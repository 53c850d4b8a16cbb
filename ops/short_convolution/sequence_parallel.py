"""The short convolution with time cut over devices: each sends its last W - 1 inputs to the next.

Backward it receives their gradient from there, which the next device computes from its first W - 1
outputs alone."""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..framework import segments
from ..framework.sequence_parallel import CARRIED, TimeAxis


def _tail(x, segment_ids, taps, reverse):
    """The state after these inputs [B, W - 1, D]."""
    keep_BT, halo = segments.reaches_end(segment_ids, reverse=reverse), taps - 1
    x = x if keep_BT is None else jnp.where(keep_BT[..., None], x, 0)
    x = x[:, :halo][:, ::-1] if reverse else x[:, x.shape[1] - halo :]
    return x.astype(jnp.float32)


def _kept(keep_B, x):
    """x [B, ...], zero where `keep_B` is false; None keeps all."""
    return x if keep_B is None else jnp.where(keep_B[:, None, None], x, 0)


class Rules:
    """See `SequenceParallel` in `ops/framework/op.py`."""

    def forward(self, rules, axis: TimeAxis, x, w, initial_state, segment_ids):
        """y and the final state; for `backward` the state that came in, and whether the first
        segment did."""
        taps = w.shape[0]
        if x.shape[1] < taps - 1:
            raise ValueError(
                f"short_convolution of W={taps} taps needs at least W - 1 tokens on each"
                f" of the {axis.size} devices along time; got {x.shape[1]}"
            )
        entered, tail = axis.entered(segment_ids), _tail(x, segment_ids, taps, rules.reverse)
        before = jnp.where(axis.rank == 0, initial_state, axis.shift(tail))
        before, entered = checkpoint_name((_kept(entered, before), entered), CARRIED)
        y, _ = rules.forward(x, w, before, segment_ids)
        final = axis.from_device(tail, axis.size - 1)
        return (y, final), (before, entered)

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of x, w and the initial state."""
        (x, w, initial_state, segment_ids), (dy, dfinal) = inputs, cotangents
        (before, entered), halo = carried, w.shape[0] - 1
        if not halo:
            return rules.backward((x, w, before, segment_ids), (dy, dfinal))
        first = slice(x.shape[1] - halo, None) if rules.reverse else slice(0, halo)
        ids = None if segment_ids is None else segment_ids[:, first]
        *_, dbefore = rules.backward(
            (x[:, first], w, before, ids), (dy[:, first], jnp.zeros_like(dfinal))
        )
        dbefore = _kept(entered, dbefore)
        dtail = jnp.where(axis.rank == axis.size - 1, dfinal, axis.shift(dbefore, by=-1))
        dx, dw, _ = rules.backward((x, w, before, segment_ids), (dy, dtail))
        return dx, dw, axis.from_device(dbefore, 0).astype(initial_state.dtype)


RULES = Rules()
