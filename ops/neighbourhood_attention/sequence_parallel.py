"""Attention within a ball with time cut over devices, each of which has whole rows of the grid.

A device needs the h rows before its own and the h behind. Where its neighbours have as many, each
sends them, and backward receives the gradient of what it sent; where they have fewer, the keys and
values of all devices are gathered, and backward their gradients are added up where they came
from."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework import segments
from ..framework.sequence_parallel import CARRIED, TimeAxis
from ..framework.sharding import SEQUENCE
from . import xla


def _around(axis: TimeAxis, x, count):
    """The `count` tokens before those of this device and as many behind, zeros where there are
    none: two arrays [B, count, ...] of x [B, T, ...]."""
    length = x.shape[1]
    if count <= length:
        return axis.shift(x[:, length - count :]), axis.shift(x[:, :count], by=-1)
    whole = lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
    whole = jnp.pad(whole, ((0, 0), (count, count), *((0, 0),) * (x.ndim - 2)))
    first = axis.rank * length
    return tuple(
        lax.dynamic_slice_in_dim(whole, start, count, axis=1)
        for start in (first, first + count + length)
    )


def _between(x, around):
    return jnp.concatenate([around[0], x, around[1]], axis=1)


def _sizes(rules, axis: TimeAxis):
    """What `xla.outputs` must know of this device's rows, and the tokens of `reach` rows."""
    grid, radius = rules.static["grid"], rules.static["radius"]
    reach = xla.reach_of(grid, radius)
    own = (grid[0] // axis.size, *grid[1:])
    sizes = {"grid": own, "reach": reach, "radius": radius, "scale": rules.static["scale"]}
    return sizes, reach * math.prod(grid[1:])


def _runs(axis: TimeAxis, q, key_mask, segment_ids, count):
    """The numbers of segments of this device's tokens, and of those and the ones around them with
    -1 for keys that are not there."""
    there = jnp.ones(q.shape[:2], jnp.int32) if key_mask is None else key_mask.astype(jnp.int32)
    there = _between(there, _around(axis, there, count))
    number = jnp.zeros(there.shape, jnp.int32)
    if segment_ids is not None:
        number = segments.numbers(_between(segment_ids, _around(axis, segment_ids, count)))
    own = number[:, count : count + q.shape[1]]
    return own, jnp.where(there > 0, number, -1)


class Rules:
    """See `SequenceParallel` in `ops/framework/op.py`."""

    def forward(
        self, rules, axis: TimeAxis, q, k, v, context_k, context_v, key_mask, context_mask, ids
    ):
        """(o,), and what came from other devices."""
        sizes, count = _sizes(rules, axis)
        around = checkpoint_name([_around(axis, x, count) for x in (k, v)], CARRIED)
        runs = checkpoint_name(_runs(axis, q, key_mask, ids, count), CARRIED)
        k, v = (_between(x, near) for x, near in zip((k, v), around, strict=True))
        context = (context_k, context_v, context_mask)
        o = xla.outputs((q, k, v), runs, context, **sizes)
        return (o.astype(v.dtype),), (around, runs)

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of q, k, v and the context, None where there is none."""
        *arrays, _, context_mask, _ = inputs
        (around, runs), (do,) = carried, cotangents
        sizes, count = _sizes(rules, axis)

        def outputs(arrays, around):
            q, k, v, *context = arrays
            k, v = (_between(x, near) for x, near in zip((k, v), around, strict=True))
            return xla.outputs((q, k, v), runs, (*context, context_mask), **sizes)

        # In float32, so that sums over devices are rounded once.
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, around))
        _, pullback = jax.vjp(outputs, *wide)
        (dq, dk, dv, *dcontext), daround = pullback(do.astype(jnp.float32))
        lent = jax.vjp(lambda kv: [_around(axis, x, count) for x in kv], wide[0][1:3])[1]
        dk, dv = map(jnp.add, (dk, dv), *lent(list(daround)))
        # Every device has the whole context, and computed what its own queries say of it.
        gradients = (dq, dk, dv, *lax.psum(tuple(dcontext), SEQUENCE))
        return tuple(
            gradient
            if gradient is None or index in rules.partial
            else gradient.astype(inputs[index].dtype)
            for index, gradient in enumerate(gradients)
        )


RULES = Rules()
