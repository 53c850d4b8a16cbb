"""Submanifold convolution 3 x 3 x 3: of the voxels that there are, at the places of these.

    y(c) = sum over d in {-1, 0, 1}^3 with a voxel at c + d of x(c + d) W_d

(Graham, Engelcke, van der Maaten, CVPR 2018, arXiv 1711.10275.) Cells are numbered with a border of
one cell, so that no neighbour is a cell of another cloud or of the opposite side. The three
neighbours of a column have numbers that follow each other: one binary search finds all three."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.lion.voxels import Voxels, cell_numbers
from models.parts.projections import FAN_IN_UNIFORM


def neighbours(voxels: Voxels) -> jax.Array:
    """int32 [9, 3, T]: the place of the neighbour at (dx, dy), dz, in ascending order; T for
    none."""
    number_T = cell_numbers(voxels)
    length = len(number_T)
    _, Y, Z = (extent + 2 for extent in voxels.grid)

    def column(step: jax.Array) -> jax.Array:
        wanted_T = jnp.where(voxels.mask_T, number_T + step, -1)
        place_T = jnp.searchsorted(number_T, wanted_T).astype(jnp.int32)
        found = []
        for dz in range(3):
            there_T = number_T.at[place_T].get(mode="fill", fill_value=-2) == wanted_T + dz
            there_T &= voxels.mask_T
            found.append(jnp.where(there_T, place_T, length))
            place_T = place_T + there_T.astype(jnp.int32)
        return jnp.stack(found)

    steps_9 = jnp.array([(dx * Y + dy) * Z - 1 for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
    return jax.lax.map(column, steps_9)


class SubmanifoldConvolution(nnx.Module):
    """x_BTD -> y_BTD float32, without bias; zeros where there is no voxel."""

    def __init__(
        self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike, compute_dtype: DTypeLike
    ):
        kernel = FAN_IN_UNIFORM(rngs.params(), (27 * width, width), param_dtype)
        self.kernel_93DE = nnx.Param(
            kernel.reshape(9, 3, width, width), out_sharding=(None, None, "embed", "heads")
        )
        self.compute_dtype = compute_dtype

    def __call__(self, x_BTD: jax.Array, neighbours_B93T: jax.Array) -> jax.Array:
        x_BTD = x_BTD.astype(self.compute_dtype)
        kernel_93DE = self.kernel_93DE[...].astype(self.compute_dtype)

        def add(y_BTE: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            places_B3T, kernel_3DE = column
            read = jax.vmap(lambda x_TD, at_3T: x_TD.at[at_3T].get(mode="fill", fill_value=0))
            return y_BTE + jnp.einsum(
                "bktd,kde->bte",
                read(x_BTD, places_B3T),
                kernel_3DE,
                preferred_element_type=jnp.float32,
            ), None

        # One column at a time, read again in the backward pass: all 27 neighbours at once would be
        # 27 times the features.
        columns = (jnp.moveaxis(neighbours_B93T, 1, 0), kernel_93DE)
        zeros_BTE = jnp.zeros(x_BTD.shape, jnp.float32)
        return jax.lax.scan(jax.checkpoint(add), zeros_BTE, columns)[0]
