"""Linear attention to all tokens with time cut over devices.

Without segments one sum of K x V states over the devices is all that passes, forward (of keys and
values) and backward (of queries and gradients). With segments, the sums over the segments of the
first and of the last token of each device are gathered, which then finds out what its own two have
elsewhere: `xla.carried`, of devices in the place of chunks. `sequence_method` changes nothing: no
state waits for another."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework.sequence_parallel import CARRIED, TimeAxis
from ..framework.sharding import SEQUENCE
from . import xla


@dataclass(frozen=True)
class _Devices:
    """`xla.Others` on a mesh."""

    axis: TimeAxis
    segment_ids: jax.Array | None

    def total(self, own: jax.Array) -> jax.Array:
        return lax.psum(own, SEQUENCE)

    def around(self, head: jax.Array, tail: jax.Array, number: jax.Array) -> tuple[Any, Any]:
        ids = self.segment_ids
        assert ids is not None
        ends = jnp.stack([ids[:, 0], ids[:, -1], (number[:, 0] == number[:, -1]).astype(ids.dtype)])
        ends, sums = self.axis.gather(ends), self.axis.gather(jnp.stack([head, tail]))
        one_segment, goes_on = ends[:, 2] != 0, ends[:-1, 1] == ends[1:, 0]
        before = xla.carried(sums[:, 1], one_segment, goes_on, None)
        behind = xla.carried(sums[:, 0], one_segment, goes_on, None, reverse=True)
        return before[self.axis.rank], behind[self.axis.rank]


class Rules:
    """See `SequenceParallel` in `ops/framework/op.py`."""

    def forward(self, rules, axis: TimeAxis, *inputs):
        """(o,), and what came from other devices."""
        o, outside = xla.outputs(inputs, _Devices(axis, inputs[-1]), **rules.static)
        return (o.astype(inputs[2].dtype),), checkpoint_name(outside, CARRIED)

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of q, k and v."""
        (do,), others = cotangents, _Devices(axis, inputs[-1])
        gradients = xla.gradients(inputs, carried, do, others, **rules.static)
        return tuple(
            gradient.astype(jnp.float32 if index in rules.partial else inputs[index].dtype)
            for index, gradient in enumerate(gradients)
        )


RULES = Rules()
