"""The orders in which LION's operators read voxels, and the groups that they are cut into.

    d = w // 2 with shift, else 0;   X = (x + d) // w_x,   i_x = (x + d) mod w_x;   y, z likewise
    NX = ceil(size_x / w_x) + 1
    along x   (((X NY + Y) NZ + Z) w_x w_y w_z + i_x w_y w_z + i_y w_z + i_z
    along y   (((Y NX + X) NZ + Z) w_x w_y w_z + i_y w_x w_z + i_x w_z + i_z

Voxels of a cloud are sorted by the key and cut into groups of g. The last group is shorter, which
operators are told of by segments; or, as in the released code, it is filled up (`fill`): slot s of
a cloud of n voxels, s >= n, holds once more what slot s - g has, or slot s mod n where n < g. What
comes of copies is dropped, but an operator that reads both ways sees them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.lion.voxels import Grid, Voxels, inverse, ranks
from models.parts.options import INT32_END, check_choice

ORDERS = ("x", "y", "random")


class Order(NamedTuple):
    """voxel_L   of each slot the place of its voxel
    segment_L   ids that differ from group to group
    slot_T      of each voxel its slot
    """

    voxel_L: jax.Array
    segment_L: jax.Array
    slot_T: jax.Array


def check_window(grid: Grid, window: Grid) -> None:
    """Raises ValueError where keys are no int32."""
    if (
        math.prod((-(-size // w) + 1) * w for size, w in zip(grid, window, strict=True))
        >= INT32_END
    ):
        raise ValueError(f"window {window} gives keys of 2^31 and more in a grid of {grid}")


def window_keys(voxels: Voxels, window: Grid, *, along: str, shift: bool) -> jax.Array:
    """The key of each voxel within its cloud, int32 or uint32 [T]; different ones for different
    voxels.

    along="random": a scrambled number of the cell, the same whatever else is in the row."""
    check_choice("along", along, ORDERS)
    if along == "random":
        # An odd factor is a bijection of 32 bits (Knuth's multiplicative hash).
        cell = voxels.places_T3.astype(jnp.uint32)
        _, Y, Z = voxels.grid
        number_T = (cell[:, 0] * Y + cell[:, 1]) * Z + cell[:, 2]
        number_T = (number_T ^ (number_T >> 15)) * jnp.uint32(2654435761)
        return number_T ^ (number_T >> 13)
    w = jnp.array(window)[None]
    moved_T3 = voxels.places_T3 + (w // 2 if shift else 0)
    X, Y, Z = jnp.moveaxis(moved_T3 // w, -1, 0)
    i_x, i_y, i_z = jnp.moveaxis(moved_T3 % w, -1, 0)
    NX, NY, NZ = (-(-size // side) + 1 for size, side in zip(voxels.grid, window, strict=True))
    w_x, w_y, w_z = window
    if along == "x":
        return ((X * NY + Y) * NZ + Z) * (w_x * w_y * w_z) + (i_x * w_y + i_y) * w_z + i_z
    return ((Y * NX + X) * NZ + Z) * (w_x * w_y * w_z) + (i_y * w_x + i_x) * w_z + i_z


def make_order(
    voxels: Voxels, window: Grid, group: int, *, along: str, shift: bool, fill: bool = False
) -> Order:
    """Voxels sorted by `window_keys` within their clouds, in groups of `group`; one row."""
    key_T = window_keys(voxels, window, along=along, shift=shift)
    place_T = jnp.arange(len(key_T))
    cloud_T, _, order_T = jax.lax.sort((voxels.cloud_T, key_T, place_T), num_keys=2)
    rank_T = ranks(cloud_T)
    if not fill:
        segment_T = jnp.cumsum(rank_T % group == 0, dtype=jnp.int32)
        return Order(order_T, segment_T, inverse(order_T))
    count_S = voxels.count_S()
    full_S = -(-count_S // group) * group
    start_S, slot_S = (jnp.cumsum(n) - n for n in (count_S, full_S))
    slots = len(key_T) + voxels.clouds * (group - 1)
    slot_L = jnp.arange(slots)
    cloud_L = jnp.searchsorted(slot_S + full_S, slot_L, side="right")
    within_L = slot_L - slot_S.at[cloud_L].get(mode="fill", fill_value=0)
    count_L = count_S.at[cloud_L].get(mode="fill", fill_value=1)
    copied_L = jnp.where(count_L < group, within_L % jnp.maximum(count_L, 1), within_L - group)
    source_L = jnp.where(within_L < count_L, within_L, copied_L)
    # Slots after the last cloud read the last place; nothing reads them.
    sorted_L = jnp.where(cloud_L < voxels.clouds, start_S[cloud_L] + source_L, len(key_T) - 1)
    slot_of_T = slot_S.at[cloud_T].get(mode="fill", fill_value=0) + rank_T
    slot_of_T = jnp.where(cloud_T < voxels.clouds, slot_of_T, slots - 1)
    slot_T = jnp.zeros_like(order_T).at[order_T].set(slot_of_T, unique_indices=True)
    return Order(order_T[sorted_L], slot_L // group, slot_T)
