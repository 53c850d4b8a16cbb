"""Window attention with time cut over devices.

A device needs the window - 1 tokens before its own. Where the device before holds as many, it
sends them, and backward it receives their gradient, which comes from the first window - 1 queries
alone. For a wider window, up to full attention, the keys and values of all devices are gathered
(LASP-2H, arXiv 2502.07563), and backward their gradients are added up where they came from. With
`sequence_method("ring")`, softmax and no state before the first token, keys and values visit one
device after another instead (`ring.py`)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework import segments
from ..framework.sequence_parallel import CARRIED, TimeAxis
from ..framework.sharding import SEQUENCE
from . import ring


def _past(k, v, k_past, v_past, valid_past, past):
    """The state before the first token, with zeros for None."""
    if valid_past is not None:
        return k_past, v_past, valid_past
    shapes = ((x.shape[0], past, *x.shape[2:]) for x in (k, v))
    valid = jnp.zeros((k.shape[0], past), bool)
    return *(jnp.zeros(s, x.dtype) for s, x in zip(shapes, (k, v), strict=True)), valid


def _like(values, arrays):
    """The values in the dtypes of these arrays: a rule takes each cotangent in that of its value,
    and the gradients of what came before are float32 where there is no initial state."""
    return tuple(x.astype(y.dtype) for x, y in zip(values, arrays, strict=False))


def _kept(keep, x):
    """x [B, T, ...], zero where keep [B, T] is false."""
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), x, 0)


def _tail(k, v, segment_ids, past):
    """k, v and valid of the last `past` tokens, of at least as many: the state that they leave."""
    keep = segments.reaches_end(segment_ids)
    keep = jnp.ones(k.shape[:2], bool) if keep is None else keep
    first = k.shape[1] - past
    keep = keep[:, first:]
    return _kept(keep, k[:, first:]), _kept(keep, v[:, first:]), keep


class Rules:
    """See `SequenceParallel` in `ops/framework/op.py`."""

    def forward(self, rules, axis: TimeAxis, q, k, v, k_past, v_past, valid_past, ids):
        """o and the parts of the final state, and what `backward` takes."""
        past = rules.static["window"] - 1
        first = _past(k, v, k_past, v_past, valid_past, past)
        if _in_a_ring(rules, axis, k.shape[1], valid_past):
            (o, log_sum), final = _ring(rules, axis, q, k, v, first, ids)
            o, log_sum = checkpoint_name((o.astype(v.dtype), log_sum), CARRIED)
            return (o, *final), (o, log_sum)
        if k.shape[1] < past:
            before, final = _gathered(axis, k, v, first, ids)
            carried = None
        else:
            before, final = _received(axis, k, v, first, ids)
            before = carried = checkpoint_name(before, CARRIED)
        o, *_ = rules.forward(q, k, v, *before, ids)
        return (o, *_like(final, (k, v)), final[2]), carried

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of all inputs; None for valid_past and ids, and for the initial state without
        one."""
        q, k, v, k_past, v_past, valid_past, ids = inputs
        past = rules.static["window"] - 1
        if _in_a_ring(rules, axis, k.shape[1], valid_past):
            return *_ring_backward(rules, axis, carried, inputs, cotangents), *(None,) * 3
        if k.shape[1] < past:
            dq, dk, dv, dk_first, dv_first = _gathered_backward(rules, axis, inputs, cotangents)
        else:
            dq, dk, dv, dk_first, dv_first = _received_backward(
                rules, axis, carried, (q, k, v, ids), cotangents
            )
        if valid_past is None:
            return dq, dk, dv, None, None, None
        return (dq, dk, dv, dk_first.astype(k_past.dtype), dv_first.astype(v_past.dtype), None)


def _received(axis: TimeAxis, k, v, first, ids):
    """The state before this device's tokens, from the device before, and the one after the tokens
    of all devices; each holds at least as many tokens as the state."""
    tail, entered = _tail(k, v, ids, first[2].shape[1]), axis.entered(ids)
    before = jax.tree.map(lambda x, y: jnp.where(axis.rank == 0, x, y), first, axis.shift(tail))
    if entered is not None:
        before = (*before[:2], before[2] & entered[:, None])
    k_last, v_last, valid = axis.from_device((*tail[:2], tail[2].astype(jnp.int32)), axis.size - 1)
    return before, (k_last, v_last, valid != 0)


def _received_backward(rules, axis: TimeAxis, before, inputs, cotangents):
    """Gradients of q, k, v and of the keys and values of the state before the first token; before:
    the state that `_received` gave."""
    (q, k, v, ids), (do, *dlast) = inputs, cotangents
    past = rules.static["window"] - 1
    near = None if ids is None else ids[:, :past]
    rows = (x[:, :past] for x in (q, k, v))
    nothing = [jnp.zeros_like(x) for x in dlast]
    dbefore = tuple(x[:, :0] for x in dlast)
    if past:
        dbefore = rules.backward((*rows, *before, near), (do[:, :past], *nothing))[3:5]
    is_last = axis.rank == axis.size - 1
    dlent = axis.shift(_like(dbefore, dlast), by=-1)
    dtail = jax.tree.map(lambda x, y: jnp.where(is_last, x, y), tuple(dlast), dlent)
    dq, dk, dv, *_ = rules.backward((q, k, v, *before, ids), (do, *dtail))
    return dq, dk, dv, *axis.from_device(dbefore, 0)


def _all_runs(axis: TimeAxis, ids, batch, length):
    """[B, T] int32: the number of the segment of each token, of all devices."""
    if ids is None:
        return jnp.zeros((batch, axis.size * length), jnp.int32)
    ids = lax.all_gather(ids, SEQUENCE, axis=1, tiled=True)
    return segments.numbers(ids)


def _own(axis: TimeAxis, x, length):
    """This device's part of time [B, n, ...] of [B, T, ...]."""
    return lax.dynamic_slice_in_dim(x, axis.rank * length, length, axis=1)


def _in_a_ring(rules, axis: TimeAxis, length: int, valid_past) -> bool:
    """Whether keys and values visit one device after another."""
    wide = length < rules.static["window"] - 1
    softmax = rules.static["activation"] == "softmax"
    return axis.method == "ring" and softmax and wide and valid_past is None


def _ring(rules, axis: TimeAxis, q, k, v, first, ids):
    """The outputs with their log sums, and the state after the tokens of all devices."""
    (batch, length), static = k.shape[:2], rules.static
    own = _own(axis, _all_runs(axis, ids, batch, length), length)
    sums = ring.forward(axis, q, k, v, own, window=static["window"], scale=static["scale"])
    return sums, _gathered(axis, k, v, first, ids)[1]


def _ring_backward(rules, axis: TimeAxis, carried, inputs, cotangents):
    """Gradients of q, k and v."""
    q, k, v, _, _, _, ids = inputs
    (o, log_sum), (do, *dlast) = carried, cotangents
    (batch, length), static = k.shape[:2], rules.static
    runs = _all_runs(axis, ids, batch, length)
    own = _own(axis, runs, length)
    dq, dk, dv = ring.backward(
        axis, q, k, v, own, o, log_sum, do, window=static["window"], scale=static["scale"]
    )
    everything, past = axis.size * length, static["window"] - 1
    # The last state's gradient, of which every device has all: its tokens are those at the end of
    # the sequence.
    dk_last, dv_last = (
        _kept(
            own == runs[:, -1:],
            _own(
                axis,
                jnp.pad(x, ((0, 0), (max(0, everything - past), 0), (0, 0), (0, 0)))[
                    :, -everything:
                ],
                length,
            ),
        )
        for x in dlast
    )
    return dq, dk + dk_last, dv + dv_last


def _gathered(axis: TimeAxis, k, v, first, ids):
    """The state before this device's tokens, and the one after the tokens of all devices."""
    (batch, length), past = k.shape[:2], first[2].shape[1]
    everything = axis.size * length
    k, v = (
        jnp.concatenate([before, lax.all_gather(x, SEQUENCE, axis=1, tiled=True)], 1)
        for before, x in zip(first, (k, v), strict=False)
    )
    run = _all_runs(axis, ids, batch, length)
    # The number of a token's segment; -1 for what is not there.
    run = jnp.concatenate([jnp.where(first[2], 0, -1), run], axis=1)

    def state(start, token):
        """The `past` tokens from `start` on that are in the segment of `token`."""
        own = lax.dynamic_slice_in_dim(run, token, 1, axis=1)
        k_part, v_part, runs = (
            lax.dynamic_slice_in_dim(x, start, past, axis=1) for x in (k, v, run)
        )
        return _kept(runs == own, k_part), _kept(runs == own, v_part), runs == own

    start = axis.rank * length
    return state(start, start + past), state(everything, everything + past - 1)


def _gathered_backward(rules, axis: TimeAxis, inputs, cotangents):
    """Gradients of q, k, v and of the keys and values of the state before the first token."""
    q, k, v, k_past, v_past, valid_past, ids = inputs
    do, *dlast = cotangents
    *first, valid = _past(k, v, k_past, v_past, valid_past, rules.static["window"] - 1)

    def before_and_after(k, v, *first):
        before, after = _gathered(axis, k, v, (*first, valid), ids)
        return (before[:2], after[:2]), before[2]

    (before, after), pullback, kept = jax.vjp(before_and_after, k, v, *first, has_aux=True)
    nothing = [jnp.zeros_like(x) for x in dlast]
    dq, dk, dv, *dbefore = rules.backward((q, k, v, *before, kept, ids), (do, *nothing))[:5]
    # What all devices hold is counted on one.
    dlast = [jnp.where(axis.rank == axis.size - 1, x, 0) for x in dlast]
    dk_all, dv_all, *dfirst = pullback((_like(dbefore, before), _like(dlast, after)))
    return dq, dk + dk_all, dv + dv_all, *lax.psum(tuple(dfirst), SEQUENCE)


RULES = Rules()
