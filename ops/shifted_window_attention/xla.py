"""Attention within windows, in plain JAX on every backend: the grid is rolled back by the shift and
cut, and windows are the batch of JAX's own attention. The backward pass computes the weights again:
only the inputs are kept.

Letters: B batch, T time, N windows, W tokens of a window."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..chunks.masked_softmax import attend
from ..framework import segments


def _to_windows(x, grid, window, shift):
    """[B, N, W, ...] of x [B, T, ...]."""
    batch, _, *rest = x.shape
    x = jnp.roll(x.reshape(batch, *grid, *rest), [-by for by in shift], _axes(grid))
    cut = [y for extent, size in zip(grid, window, strict=True) for y in (extent // size, size)]
    x = x.reshape(batch, *cut, *rest)
    inside = range(1, 1 + len(cut))
    x = x.transpose(0, *inside[::2], *inside[1::2], *range(1 + len(cut), x.ndim))
    tokens = math.prod(window)
    return x.reshape(batch, math.prod(grid) // tokens, tokens, *rest)


def _from_windows(x, grid, window, shift):
    """The inverse of `_to_windows`."""
    batch, _, _, *rest = x.shape
    counts = [extent // size for extent, size in zip(grid, window, strict=True)]
    x = x.reshape(batch, *counts, *window, *rest)
    n = len(grid)
    pairs = [axis for index in range(1, 1 + n) for axis in (index, index + n)]
    x = x.transpose(0, *pairs, *range(1 + 2 * n, x.ndim)).reshape(batch, *grid, *rest)
    return jnp.roll(x, shift, _axes(grid)).reshape(batch, math.prod(grid), *rest)


def _axes(grid):
    return tuple(range(1, 1 + len(grid)))


def _parts(grid, shift):
    """[1, T]: numbers of the parts that the edges of the grid cut windows into; None without a
    shift."""
    if not any(shift):
        return None
    number = np.zeros(grid, np.int32)
    for axis, (extent, by) in enumerate(zip(grid, shift, strict=True)):
        before = np.arange(extent) < by
        number += 2**axis * before.reshape([-1 if i == axis else 1 for i in range(len(grid))])
    return jnp.asarray(number.reshape(1, -1))


def _sees(key_mask, segment_ids, grid, shift, cut):
    """[B or 1, N, W, W] bool: who sees whom in a window; None for all."""
    sees = None
    for number in (_parts(grid, shift), segments.numbers(segment_ids)):
        if number is not None:
            number = cut(number)
            same = number[..., :, None] == number[..., None, :]
            sees = same if sees is None else sees & same
    if key_mask is None:
        return sees
    there = cut(key_mask)[:, :, None, :]
    there = jnp.broadcast_to(there, (*there.shape[:2], there.shape[3], there.shape[3]))
    return there if sees is None else sees & there


def _outputs(q, k, v, bias, key_mask, segment_ids, *, grid, window, shift, scale):
    def cut(x):
        return _to_windows(x, grid, window, shift)

    if key_mask is not None:
        k, v = (jnp.where(key_mask[:, :, None, None], x, 0) for x in (k, v))
    sees = _sees(key_mask, segment_ids, grid, shift, cut)
    of_each = sees is not None and len(sees) == len(q)
    if sees is not None and not of_each:
        sees = sees[0]
    bias = None if bias is None else bias.astype(jnp.float32)

    def of_sequence(q, k, v, sees):
        return attend(q, k, v, sees, bias, scale)

    o = jax.vmap(of_sequence, (0, 0, 0, 0 if of_each else None))(cut(q), cut(k), cut(v), sees)
    return _from_windows(o, grid, window, shift)


def forward(q, k, v, bias, key_mask, segment_ids, **options):
    """(o,) in float32; shapes as in `api.py`."""
    return (_outputs(q, k, v, bias, key_mask, segment_ids, **options),)


def backward(q, k, v, bias, key_mask, segment_ids, do, **options):
    """Gradients of q, k, v and bias, None without one."""

    def outputs(q, k, v, bias):
        return _outputs(q, k, v, bias, key_mask, segment_ids, **options)

    _, pullback = jax.vjp(outputs, q, k, v, bias)
    return pullback(do.astype(jnp.float32))
