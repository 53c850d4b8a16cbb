"""Gaussian-kernel attention with time cut over devices.

Landmarks are whole on all of them, and what passes is one sum of m x V numbers forward, and
backward one more and the landmarks' gradient. Every device inverts the landmarks' kernel itself."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..framework.sequence_parallel import CARRIED, TimeAxis
from ..framework.sharding import SEQUENCE
from . import xla


class _Devices:
    """`xla.Others` on a mesh."""

    def total(self, own: jax.Array) -> jax.Array:
        return lax.psum(own, SEQUENCE)


class Rules:
    """See `SequenceParallel` in `ops/framework/op.py`."""

    def forward(self, rules, axis: TimeAxis, *inputs):
        """o and the residual, and U."""
        del axis
        o, residual, U = xla.outputs(inputs, _Devices(), **rules.static)
        return (o.astype(inputs[2].dtype), residual), checkpoint_name(U, CARRIED)

    def backward(self, rules, axis: TimeAxis, carried, inputs, cotangents):
        """Gradients of q, landmarks and v; every device has that of the landmarks whole."""
        del axis
        gradients = xla.gradients(inputs, carried, cotangents[0], _Devices(), **rules.static)
        return tuple(
            gradient.astype(jnp.float32 if index in rules.partial else inputs[index].dtype)
            for index, gradient in enumerate(gradients)
        )


RULES = Rules()
