"""Sparse voxels of several clouds in one row of fixed length: their order, cells that merge, voxels
that are generated.

A row holds the voxels of clouds 0 .. S - 1, in the order of (cloud, x, y, z), and then places
without a voxel, whose cloud is S. Nothing is as large as the grid. All functions are of one row;
networks map them over a batch.

    merge     c' = c // stride, features of equal cells add up; the coarse grid is
              ceil(grid / stride)
    expand    a voxel takes the features of its cell, the transpose of the sum
    generate  the floor(share n) best of a cloud's n voxels are copied to the four diagonal
              neighbours in (x, y), clipped to the grid, without features

T places, S clouds, C channels."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from models.parts.options import INT32_END

Grid = tuple[int, int, int]
DIAGONALS = ((-1, 1), (1, 1), (-1, -1), (1, -1))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("places_T3", "cloud_T"),
    meta_fields=("grid", "clouds"),
)
@dataclass(frozen=True)
class Voxels:
    """places_T3   int32 (x, y, z) of each voxel
    cloud_T     int32, the cloud that it belongs to; `clouds` where there is no voxel
    grid        extents (X, Y, Z), static
    clouds      S, static
    """

    places_T3: jax.Array
    cloud_T: jax.Array
    grid: Grid
    clouds: int

    @property
    def mask_T(self) -> jax.Array:
        """Where there is a voxel."""
        return self.cloud_T < self.clouds

    def count_S(self) -> jax.Array:
        """Voxels of each cloud, int32 [S]."""
        return jnp.zeros(self.clouds, jnp.int32).at[self.cloud_T].add(1, mode="drop")


def check_grid(grid: Grid, clouds: int, what: str = "the grid") -> None:
    """Raises ValueError where the cells of all clouds of a row, with a border of one cell, cannot
    be numbered in int32."""
    if clouds * math.prod(extent + 2 for extent in grid) >= INT32_END:
        raise ValueError(
            f"{what} must have fewer than 2^31 cells in the clouds of a row together, a border"
            f" included; got {grid} for {clouds} clouds"
        )


def cell_numbers(voxels: Voxels, places_T3: jax.Array | None = None) -> jax.Array:
    """int32 [T]: the number of each voxel's cell among those of all clouds with a border of one
    cell, ascending in the order of (cloud, x, y, z); the largest int32 without a voxel."""
    x_T, y_T, z_T = jnp.moveaxis(voxels.places_T3 if places_T3 is None else places_T3, -1, 0)
    X, Y, Z = (extent + 2 for extent in voxels.grid)
    number_T = ((voxels.cloud_T * X + x_T + 1) * Y + y_T + 1) * Z + z_T + 1
    return jnp.where(voxels.mask_T, number_T, INT32_END - 1)


def sort_voxels(voxels: Voxels) -> tuple[Voxels, jax.Array]:
    """The voxels in the order that this file asks for, and of each of them where it was, [T]."""
    place_T = jnp.arange(len(voxels.cloud_T))
    _, order_T = jax.lax.sort((cell_numbers(voxels), place_T), num_keys=1)
    return (
        Voxels(voxels.places_T3[order_T], voxels.cloud_T[order_T], voxels.grid, voxels.clouds),
        order_T,
    )


def inverse(order_T: jax.Array) -> jax.Array:
    """The permutation that undoes `order_T`."""
    place_T = jnp.arange(len(order_T), dtype=order_T.dtype)
    return jnp.zeros_like(order_T).at[order_T].set(place_T, unique_indices=True)


def ranks(cloud_T: jax.Array) -> jax.Array:
    """How many places of the same cloud stand before each, [T], of clouds in ascending order."""
    place_T = jnp.arange(len(cloud_T))
    starts_T = jnp.concatenate((jnp.ones(1, bool), cloud_T[1:] != cloud_T[:-1]))
    return place_T - jax.lax.cummax(jnp.where(starts_T, place_T, 0))


def merge_cells(
    voxels: Voxels, stride: Grid, capacity: int, added: tuple[jax.Array, jax.Array] | None = None
) -> tuple[Voxels, jax.Array]:
    """The coarse voxels, of `capacity` places, and of each fine voxel the place of its cell, [T];
    `capacity` without a voxel.

    added: places [M, 3] and clouds [M] of further fine voxels, which may coincide with others."""
    places, cloud = voxels.places_T3, voxels.cloud_T
    if added is not None:
        places, cloud = (jnp.concatenate(both) for both in ((places, added[0]), (cloud, added[1])))
    grid = tuple(-(-extent // step) for extent, step in zip(voxels.grid, stride, strict=True))
    coarse = Voxels(
        places // jnp.array(stride)[None], cloud, (grid[0], grid[1], grid[2]), voxels.clouds
    )
    coarse, order = sort_voxels(coarse)
    number = cell_numbers(coarse)
    first = jnp.concatenate((jnp.ones(1, bool), number[1:] != number[:-1]))
    cell = jnp.where(coarse.mask_T, jnp.cumsum(first, dtype=jnp.int32) - 1, capacity)
    merged = Voxels(
        jnp.zeros((capacity, 3), jnp.int32).at[cell].set(coarse.places_T3, mode="drop"),
        jnp.full(capacity, voxels.clouds, jnp.int32).at[cell].set(coarse.cloud_T, mode="drop"),
        coarse.grid,
        coarse.clouds,
    )
    parent = jnp.zeros_like(cell).at[order].set(cell, unique_indices=True)
    return merged, parent[: len(voxels.cloud_T)]


def sum_cells(x_TC: jax.Array, parent_T: jax.Array, capacity: int) -> jax.Array:
    """Features [capacity, C] of cells: the sum over the voxels in each."""
    zeros = jnp.zeros((capacity, x_TC.shape[1]), x_TC.dtype)
    return zeros.at[parent_T].add(x_TC, mode="drop")


def expand_cells(x_PC: jax.Array, parent_T: jax.Array) -> jax.Array:
    """Features [T, C] of voxels: those of their cells; zeros without a voxel."""
    return x_PC.at[parent_T].get(mode="fill", fill_value=0)


def generated(
    voxels: Voxels, score_T: jax.Array, share: float, limit_S: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Places [4 M, 3] and clouds [4 M] of the voxels that are generated, M = floor(share T).

    Of a cloud with n voxels the floor(share n) of the highest score have copies, the first of
    equals, and no more than limit_S / 4."""
    count_S = voxels.count_S()
    chosen_S = jnp.floor(share * count_S.astype(jnp.float32)).astype(jnp.int32)
    chosen_S = jnp.minimum(chosen_S, jnp.maximum(limit_S, 0) // 4)
    place_T = jnp.arange(len(score_T))
    cloud_T, _, order_T = jax.lax.sort((voxels.cloud_T, -score_T, place_T), num_keys=2)
    wanted_T = ranks(cloud_T) < chosen_S.at[cloud_T].get(mode="fill", fill_value=0)
    most = math.floor(share * len(score_T))
    first_M = jnp.argsort(~wanted_T, stable=True)[:most]
    places_M3 = voxels.places_T3[order_T[first_M]]
    cloud_M = jnp.where(wanted_T[first_M], cloud_T[first_M], voxels.clouds)
    highest = jnp.array(voxels.grid)[None] - 1
    copies = [
        jnp.clip(places_M3 + jnp.array((dx, dy, 0))[None], 0, highest) for dx, dy in DIAGONALS
    ]
    return jnp.concatenate(copies), jnp.tile(cloud_M, len(DIAGONALS))


def merge_height(
    voxels: Voxels, score_T: jax.Array, share: float, most_S: jax.Array, capacity: int
) -> tuple[Voxels, jax.Array]:
    """`merge_cells` of two voxels above each other, with generated ones: no more of them than leave
    each cloud with at most most_S voxels afterwards."""
    # In the order of (cloud, x, y, z) a merge along z keeps the order.
    number_T = cell_numbers(voxels, voxels.places_T3 // jnp.array((1, 1, 2))[None])
    first_T = jnp.concatenate((jnp.ones(1, bool), number_T[1:] != number_T[:-1]))
    cells_S = (
        jnp.zeros(voxels.clouds, jnp.int32)
        .at[voxels.cloud_T]
        .add(first_T.astype(jnp.int32), mode="drop")
    )
    added = generated(voxels, score_T, share, most_S - cells_S) if share else None
    return merge_cells(voxels, (1, 1, 2), capacity, added)
