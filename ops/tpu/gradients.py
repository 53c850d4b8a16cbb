"""Layout of the gradients that backward kernels with a matrix state write: of q and k, of the log
decays, and of one number per token and head."""

from typing import Any

import jax
import jax.numpy as jnp

from .heads import HeadGrid, Step, flat_shape
from .kernel import Output, Ref


def key_head_output(x_BTHK: jax.Array, grid: HeadGrid) -> Output:
    """Of the gradient of q or k, [B, T, HK * parts * K]: where several steps share a key head, each
    writes its own part of the sum, in float32."""
    batch, length, heads, size = x_BTHK.shape
    parts = grid.steps_per_key_head
    dtype = x_BTHK.dtype if parts == 1 else jnp.float32
    shape = jax.ShapeDtypeStruct((batch, length, heads * parts * size), dtype)
    return Output(shape, grid.key_part_tile())


def sum_of_parts(dx: Any, x_BTHK: jax.Array, grid: HeadGrid) -> jax.Array:
    """The gradient of q or k [B, T, HK, K], from what `key_head_output` holds."""
    parts = grid.steps_per_key_head
    if parts == 1:
        return dx.reshape(x_BTHK.shape)
    batch, length, heads, size = x_BTHK.shape
    return dx.reshape(batch, length, heads, parts, size).sum(3)


class KeyHeadSum:
    """The gradient of q or k inside a kernel: a sum over the value heads of each key head, written
    to `ref` with the last of them."""

    def __init__(self, ref: Ref, step: Step):
        self.ref, self.step = ref, step
        self.sums: dict[int, jax.Array] = {}

    def add(self, head: int, gradient: jax.Array) -> None:
        """gradient: [C, K], of value head `head`."""
        group = self.step.grid.group
        key_head, place = divmod(head, group)
        sums = self.sums
        sums[key_head] = sums[key_head] + gradient if place > 0 else gradient
        if place == group - 1:
            self.step.write(self.ref, key_head, sums[key_head])


def value_output(v_BTHV: jax.Array, grid: HeadGrid) -> Output:
    """Of the gradient of v, [B, T, H * V]."""
    return Output(flat_shape(v_BTHV), grid.value_tile(backward=True))


def token_output(grid: HeadGrid) -> Output:
    """Of one float32 per token and head, as rows [heads, C] of a step."""
    sizes = grid.batch, grid.head_blocks, grid.steps, grid.heads, grid.chunk
    shape = jax.ShapeDtypeStruct(sizes, jnp.float32)
    return Output(shape, grid.rows_tile(shape, backward=True))


def decay_output(decay_log: jax.Array | None, grid: HeadGrid) -> Output | None:
    """Of the gradient of a decay that is an input, else None."""
    if decay_log is None:
        return None
    if decay_log.ndim < 4:
        return token_output(grid)
    return Output(flat_shape(decay_log), grid.decay_tile(backward=True))


def write_decay(ref: Ref | None, head: int, dlog: jax.Array | None, step: Step) -> None:
    """Writes the gradient [C, K] or [1, C] of one head to the tile of `decay_output`, if it is
    asked for."""
    if ref is None:
        return
    assert dlog is not None
    if dlog.shape[0] == 1:
        ref[0, 0, 0, head : head + 1] = dlog
    else:
        step.write(ref, head, dlog)


def decay_gradient(dlog: Any, decay_log: jax.Array | None, grid: HeadGrid) -> jax.Array | None:
    """The gradient of `decay_log` in its shape, from what `decay_output` holds."""
    if decay_log is None:
        return None
    if decay_log.ndim == 4:
        return dlog.reshape(decay_log.shape)
    dlog_BHT = grid.from_rows(dlog)
    return dlog_BHT.sum((0, 2)) if decay_log.ndim == 1 else dlog_BHT.swapaxes(1, 2)
