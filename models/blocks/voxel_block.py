"""LION's block over sparse voxels (models/lion): operators in groups of window-sorted voxels, at
three resolutions.

    twice   x <- x + positions(c);  x <- layer(x);  keep x;  x <- norm(merge(descriptor(x)))
    twice   x <- layer(x);  x <- norm(expand(x) + what was kept)

Merges are 2 x 2 x 2 and generate nothing; windows and groups are those of the block at all three.
The first layer of each pair has windows at the grid's corner, the second shifted ones.

    positions(c) = W' relu(BN(W (2 pi (c - size / 2) / size)))      size: of the grid at this level
    descriptor(x) = gelu(LN(submanifold convolution of x))

Everything that follows from places alone is computed once per batch, in `find_places`."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.batch_norm import BatchNorm
from models.blocks.block import Block, BlockOptions, Context
from models.lion.orders import Order, check_window, make_order
from models.lion.submanifold import SubmanifoldConvolution, neighbours
from models.lion.voxels import Grid, Voxels, expand_cells, merge_cells, sum_cells
from models.parts.norms import layer_norm
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection

HALVING: Grid = (2, 2, 2)
NORM_EPS = 1e-5
PI = 3.1415  # of the released code


@dataclass(frozen=True)
class Reading:
    """How layers read voxels: windows (x, y, z), groups of `group`, one operator for each of
    `orders`, whether windows of second layers are shifted and last groups filled with copies."""

    window: Grid
    group: int
    orders: tuple[str, ...]
    shifted: bool
    fill: bool

    def of(self, voxels: Voxels, shift: bool) -> tuple[Order, ...]:
        """The orders of one row, one for each operator of a layer."""
        return tuple(
            make_order(
                voxels,
                self.window,
                self.group,
                along=along,
                shift=shift and self.shifted,
                fill=self.fill,
            )
            for along in self.orders
        )


class Places(NamedTuple):
    """What a block needs to know of where voxels are, of a batch of rows.

    levels      voxels at the three resolutions
    parents     of each voxel of the first two its cell in the next one, [B, T]
    orders      of the layers at the three
    around      neighbours of the voxels of the first two, for descriptors; None without
    """

    levels: tuple[Voxels, ...]
    parents: tuple[jax.Array, ...]
    orders: tuple[tuple[Order, ...], ...]
    around: tuple[Any, ...]


def find_places(voxels: Voxels, reading: Reading, described: bool) -> Places:
    """The places of a batch of voxels [B, T]."""

    def of_row(fine: Voxels) -> Places:
        length = len(fine.cloud_T)
        middle, first = merge_cells(fine, HALVING, length)
        coarse, second = merge_cells(middle, HALVING, length)
        for level in (fine, middle, coarse):
            check_window(level.grid, reading.window)
        levels = (fine, middle, coarse)
        return Places(
            levels,
            (first, second),
            tuple(reading.of(level, place == 1) for place, level in enumerate(levels)),
            tuple(neighbours(level) if described else None for level in (fine, middle)),
        )

    return jax.vmap(of_row)(voxels)


class Layer(nnx.Module):
    """An operator for each order, one after the other; x_BTD float32 -> float32."""

    def __init__(
        self,
        mixers: list[Any],
        mixer_options: list[Any],
        width: int,
        *,
        depth: int,
        first: int,
        options: BlockOptions,
        **given: Any,
    ):
        self.operators = nnx.List(
            Block(
                mixer,
                width,
                depth=depth,
                layer=first + number,
                mixer_options=own,
                options=options,
                **given,
            )
            for number, (mixer, own) in enumerate(zip(mixers, mixer_options, strict=True))
        )

    def __call__(self, x_BTD: jax.Array, orders: tuple[Order, ...]) -> jax.Array:
        for operator, order in zip(self.operators, orders, strict=True):
            ids_BL = order.segment_L
            context = Context(segment_ids=ids_BL, separate_ids=ids_BL)
            read_BLD = jnp.take_along_axis(x_BTD, order.voxel_L[..., None], axis=1)
            y_BLD, _ = operator(read_BLD, None, None, context)
            x_BTD = jnp.take_along_axis(y_BLD, order.slot_T[..., None], axis=1)
        return x_BTD


class Positions(nnx.Module):
    """What is added to the features for their places, [B, T, D] float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        dense = functools.partial(
            projection,
            init=FAN_IN_UNIFORM,
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )
        self.first = dense(3, width, (None, "embed"), bias_init=fan_in_bias(3))
        self.norm = BatchNorm(width, eps=NORM_EPS, axis="embed", param_dtype=param_dtype)
        self.second = dense(width, width, ("embed", None), bias_init=fan_in_bias(width))

    def __call__(self, voxels: Voxels) -> jax.Array:
        size = jnp.array(voxels.grid, jnp.float32)[None, None]
        angle_BT3 = 2 * PI * (voxels.places_T3.astype(jnp.float32) - size / 2) / size
        return self.second(jax.nn.relu(self.norm(self.first(angle_BT3), voxels.mask_T)))


class Descriptor(nnx.Module):
    """gelu(LN(submanifold convolution)), x_BTD -> float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike, **given: Any):
        self.convolution = SubmanifoldConvolution(
            width, rngs=rngs, param_dtype=param_dtype, **given
        )
        self.norm = layer_norm(
            width, eps=NORM_EPS, axis="embed", rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x_BTD: jax.Array, around: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.norm(self.convolution(x_BTD, around)), approximate=False)


class Merge(nnx.Module):
    """LN of the sums over cells, float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.norm = layer_norm(
            width, eps=NORM_EPS, axis="embed", rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x_BTD: jax.Array, parent_BT: jax.Array, capacity: int) -> jax.Array:
        return self.norm(
            jax.vmap(lambda x, parent: sum_cells(x, parent, capacity))(x_BTD, parent_BT)
        )


class Expand(nnx.Module):
    """LN of the cells' features and what was kept, float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        self.norm = layer_norm(
            width, eps=NORM_EPS, axis="embed", rngs=rngs, param_dtype=param_dtype
        )

    def __call__(self, x_BPD: jax.Array, parent_BT: jax.Array, kept_BTD: jax.Array) -> jax.Array:
        return self.norm(jax.vmap(expand_cells)(x_BPD, parent_BT) + kept_BTD)


class VoxelBlock(nnx.Module):
    """x_BTD float32 -> float32, over the voxels of `Places`. `make_layer()` returns a new layer, of
    which there are four."""

    def __init__(
        self,
        make_layer: Any,
        width: int,
        *,
        described: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        given: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}

        def twice(make: Any, **more: Any) -> nnx.List[Any]:
            return nnx.List(make(width, **given, **more) for _ in range(2))

        self.positions = twice(Positions)
        self.down = nnx.List(make_layer() for _ in range(2))
        self.descriptors = twice(Descriptor, compute_dtype=compute_dtype) if described else None
        self.merges = twice(Merge)
        self.up = nnx.List(make_layer() for _ in range(2))
        self.expands = twice(Expand)

    def __call__(self, x_BTD: jax.Array, places: Places) -> jax.Array:
        kept = []
        for level in range(2):
            x_BTD = x_BTD + self.positions[level](places.levels[level])
            x_BTD = self.down[level](x_BTD, places.orders[level])
            kept.append(x_BTD)
            if self.descriptors is not None:
                x_BTD = self.descriptors[level](x_BTD, places.around[level])
            x_BTD = self.merges[level](x_BTD, places.parents[level], x_BTD.shape[1])
        for step, level in enumerate((2, 1)):
            x_BTD = self.up[step](x_BTD, places.orders[level])
            x_BTD = self.expands[step](x_BTD, places.parents[level - 1], kept[level - 1])
        return x_BTD
