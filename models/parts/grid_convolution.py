"""Depthwise convolution of tokens that lie on a grid."""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Range
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias
from ops.framework import segments
from ops.framework.grid import check_grid

KernelSize = Annotated[int, Range(0, 31)]  # odd, or 0 for no convolution


def head_filters(
    kernel_size: int, size: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> tuple[nnx.Param | None, nnx.Param | None]:
    """weight_YXK and bias_K of a convolution whose filters all heads of this size share; None for
    a kernel_size of 0. Raises ValueError for an even one."""
    if not kernel_size:
        return None, None
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, or 0 for none; got {kernel_size}")
    shape = (kernel_size, kernel_size, 1, size)
    weight_YXK = FAN_IN_UNIFORM(rngs.params(), shape, param_dtype)[:, :, 0]
    bias_K = fan_in_bias(kernel_size**2)(rngs.params(), (size,), param_dtype)
    return (
        nnx.Param(weight_YXK, out_sharding=(None, None, None)),
        nnx.Param(bias_K, out_sharding=(None,)),
    )


def convolved_heads(
    v_BTD: jax.Array,
    weight_YXK: nnx.Param,
    bias_K: nnx.Param,
    grid: tuple[int, ...] | None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """The convolution of each head of v by the same filters, and their bias: [B, T, D], float32."""
    heads = v_BTD.shape[-1] // weight_YXK.shape[-1]
    weight_YXD = jnp.tile(weight_YXK[...], (1, 1, heads))
    bias_D = jnp.tile(bias_K[...], heads).astype(jnp.float32)
    local_BTD = grid_convolution(v_BTD, weight_YXD, grid, segment_ids)
    return local_BTD.astype(jnp.float32) + bias_D[None, None]


def grid_convolution(
    x_BTD: jax.Array,
    weight_YXD: jax.Array,
    grid: tuple[int, ...] | None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """y(r, c) = sum over i, j of weight[i, j] x(r + i - Y // 2, c + j - X // 2), [B, T, D].

    Y and X are odd; x is 0 outside of the grid (rows, columns), or of a line of one row for None,
    and in other segments: a token reads those of the run of equal ids that it is in. In x's dtype.
    A sum of shifted products: at these few taps it takes a third of the time of a grouped
    convolution on CPUs, forward and backward, and fuses elsewhere. Raises ValueError for a grid
    that is no image of T tokens."""
    batch, length, width = x_BTD.shape
    grid = (1, length) if grid is None else check_grid(grid, length)
    if len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns) for a convolution of images; got {grid}")
    weight_YXD = weight_YXD.astype(x_BTD.dtype)
    high, wide, _ = weight_YXD.shape
    around = ((0, 0), (high // 2, high // 2), (wide // 2, wide // 2))
    x = jnp.pad(x_BTD.reshape(batch, *grid, width), (*around, (0, 0)))
    number = padded = None
    if segment_ids is not None:
        number = segments.numbers(segment_ids).reshape(batch, *grid)
        padded = jnp.pad(number, around, constant_values=-1)
    y = jnp.zeros((batch, *grid, width), x_BTD.dtype)
    for i in range(high):
        for j in range(wide):
            if _outside(i, high, grid[0]) or _outside(j, wide, grid[1]):
                continue
            rows, columns = slice(i, i + grid[0]), slice(j, j + grid[1])
            tap = x[:, rows, columns]
            if number is not None and padded is not None:
                tap = jnp.where((padded[:, rows, columns] == number)[..., None], tap, 0)
            y += weight_YXD[i, j][None, None, None] * tap
    return y.reshape(batch, length, width)


def _outside(tap: int, taps: int, extent: int) -> bool:
    """Whether a tap reads nothing but zeros in a dimension of this extent."""
    return abs(tap - taps // 2) >= extent
