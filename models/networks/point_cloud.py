"""A network over sparse voxels: LION's blocks (models/lion), and a head of classes for each voxel
or for each cloud.

    x = features W + b
    each block:   x = block(x);  keep x;  x = norm(merge(descriptor(x)))       two voxels above each
                                                                               other become one
    x = layer(x)
    clouds:       logits = norm(mean of x over the voxels of a cloud) W + b
    voxels:       backwards through the blocks x = norm(expand(x) + what was kept);
                  logits = norm(x) W + b

In the merges between blocks voxels are generated (models/lion/voxels.py). Detection heads of the
paper are not here; the way back to single voxels is ours.

A row holds several clouds, which never meet: not in a sort, a group, a convolution or a merge. The
one exception are the statistics of a batch that training has in the embedding of places; under
`model.eval()` there are none. Every level has as many places as the row, times `growth` where
voxels are generated: shapes do not depend on the data, and no voxel is lost."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.block import BlockOptions
from models.blocks.stack import find_mixer
from models.blocks.voxel_block import (
    Descriptor,
    Expand,
    Layer,
    Merge,
    Reading,
    VoxelBlock,
    find_places,
)
from models.lion.orders import ORDERS, check_window
from models.lion.voxels import Voxels, check_grid, inverse, merge_height, sort_voxels
from models.parts.options import Probability, Range, Reach, Size, check_choice, check_options
from models.parts.projections import projection

Side = Annotated[int, Range(1, 2**15)]
Growth = Annotated[float, Range(1, 16)]


class PointCloud(nnx.Module):
    """Packed voxels to logits; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        clouds: int,
        per_voxel: int,
        width: Size,
        windows: tuple[tuple[Side, Side, Side], ...],
        groups: tuple[Reach, ...],
        pattern: tuple[str, ...],
        mixers: Mapping[str, Mapping[str, Any]] | None = None,
        orders: tuple[str, ...] = ("x", "y"),
        shifted_windows: bool = True,
        fill_groups: bool = False,
        descriptor: bool = True,
        generated: Probability = 0.2,
        growth: Growth = 1.8,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **block: Any,
    ):
        self.grid, self.clouds, self.channels = (grid_x, grid_y, grid_z), clouds, channels
        self.per_voxel, self.generated, self.growth = bool(per_voxel), generated, growth
        for along in orders:
            check_choice("orders, each", along, ORDERS)
        if len(windows) < 2 or len(windows) != len(groups):
            raise ValueError(
                "windows and groups must have one entry for each block, at least one, and one for"
                f" the last layer; got {len(windows)} windows and {len(groups)} groups"
            )
        if not pattern:
            raise ValueError("pattern must name a mixer; got ()")
        check_grid(self.grid, clouds)
        self.readings = tuple(
            Reading(
                (window[0], window[1], window[2]),
                group,
                tuple(orders),
                shifted_windows,
                fill_groups,
            )
            for window, group in zip(windows, groups, strict=True)
        )
        for reading in self.readings:
            check_window(self.grid, reading.window)
        common: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        both = {**common, "compute_dtype": compute_dtype}
        options = BlockOptions(**block)
        layers = _layers(
            pattern, mixers or {}, len(orders), 4 * len(windows) - 3, width, options, both
        )

        dense = functools.partial(
            projection, init=nnx.initializers.lecun_normal(), bias=True, compute_dtype=jnp.float32
        )
        self.embedding = dense(channels, width, (None, "embed"), **common)
        between = range(len(windows) - 1)
        self.blocks = nnx.List(
            VoxelBlock(functools.partial(next, layers), width, described=descriptor, **both)
            for _ in between
        )
        self.descriptors = (
            nnx.List(Descriptor(width, **both) for _ in between) if descriptor else None
        )
        self.merges = nnx.List(Merge(width, **common) for _ in between)
        self.layer = next(layers)
        self.expands = nnx.List(Expand(width, **common) for _ in between) if per_voxel else None
        self.norm = options.make_norm(width, **common)
        self.head = dense(width, classes, ("embed", None), **common)

    def __call__(
        self,
        features_BTF: jax.Array,
        *,
        coordinates: jax.Array,
        segment_ids: jax.Array,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Logits, float32: [B, T, classes] of voxels, or [B, S, classes] of clouds.

        features [B, T, F]; coordinates int [B, T, 3], (x, y, z) within the grid, different in a
        cloud; segment_ids int [B, T]: the cloud, 0 to S - 1; mask bool [B, T]: where there is a
        voxel, None everywhere. What is given of other places is not read, nor are their logits to
        be. A cloud without a voxel has the logits of zeros. Raises ValueError for other shapes."""
        if features_BTF.ndim != 3 or features_BTF.shape[2] != self.channels:
            raise ValueError(f"features must be [B, T, {self.channels}]; got {features_BTF.shape}")
        rows = features_BTF.shape[:2]
        if coordinates.shape != (*rows, 3) or segment_ids.shape != rows:
            raise ValueError(
                f"coordinates and segment_ids must be [B, T, 3] and [B, T] for features {rows}; got"
                f" {coordinates.shape} and {segment_ids.shape}"
            )
        cloud_BT = segment_ids if mask is None else jnp.where(mask, segment_ids, self.clouds)
        given = Voxels(
            coordinates.astype(jnp.int32), cloud_BT.astype(jnp.int32), self.grid, self.clouds
        )
        voxels, order_BT = jax.vmap(sort_voxels)(given)
        features_BTF = jnp.take_along_axis(features_BTF, order_BT[..., None], axis=1)
        # What stands where there is no voxel is to reach no sum and no gradient, whatever it is.
        there_BT1 = voxels.mask_T[..., None]
        x_BTD = self.embedding(jnp.where(there_BT1, features_BTF.astype(jnp.float32), 0.0))
        x_BTD = jnp.where(there_BT1, x_BTD, 0.0)
        most_BS = jnp.floor(self.growth * jax.vmap(Voxels.count_S)(voxels).astype(jnp.float32))
        kept = []
        for number, block in enumerate(self.blocks):
            places = find_places(voxels, self.readings[number], self.descriptors is not None)
            x_BTD = block(x_BTD, places)
            fine_BTD, (voxels, parent_BT) = x_BTD, (voxels, order_BT)
            x_BTD, voxels, parent_BT = self._merged(number, x_BTD, voxels, most_BS, places)
            kept.append((fine_BTD, parent_BT))
        last = self.readings[-1]
        x_BTD = self.layer(x_BTD, jax.vmap(lambda row: last.of(row, False))(voxels))
        if self.expands is None:
            return self.head(self.norm(_means(x_BTD, voxels)))
        for expand, (fine_BTD, parent_BT) in reversed(list(zip(self.expands, kept, strict=True))):
            x_BTD = expand(x_BTD, parent_BT, fine_BTD)
        logits_BTC = self.head(self.norm(x_BTD))
        return jnp.take_along_axis(logits_BTC, jax.vmap(inverse)(order_BT)[..., None], axis=1)

    def _merged(
        self, number: int, x_BTD: jax.Array, voxels: Voxels, most_BS: jax.Array, places: Any
    ) -> tuple[jax.Array, Voxels, jax.Array]:
        """The features, the voxels and the parents behind block `number`."""
        if self.descriptors is not None:
            x_BTD = self.descriptors[number](x_BTD, places.around[0])
        score_BT = jax.lax.stop_gradient(jnp.mean(x_BTD, axis=-1))
        length = x_BTD.shape[1]
        if self.generated and number == 0:
            length = int(self.growth * length)
        voxels, parent_BT = jax.vmap(
            lambda row, score_T, most_S: merge_height(
                row, score_T, self.generated, most_S.astype(jnp.int32), length
            )
        )(voxels, score_BT, most_BS)
        return self.merges[number](x_BTD, parent_BT, length), voxels, parent_BT


def _layers(
    pattern: tuple[str, ...],
    mixers: Mapping[str, Mapping[str, Any]],
    orders: int,
    layers: int,
    width: int,
    options: BlockOptions,
    given: Mapping[str, Any],
) -> Any:
    """An iterator over new layers, whose operators follow the pattern from one to the next."""
    classes = {name: find_mixer(name) for name in dict.fromkeys((*pattern, *mixers))}
    for name, mixer in classes.items():
        check_options(f"mixer {name}", f"model.mixers.{name}", mixers.get(name, {}), mixer)
    depth = layers * orders
    for first in range(0, depth, orders) if orders else [0] * layers:
        names = [pattern[(first + place) % len(pattern)] for place in range(orders)]
        yield Layer(
            [classes[name] for name in names],
            [mixers.get(name, {}) for name in names],
            width,
            depth=depth,
            first=first,
            options=options,
            **given,
        )


def _means(x_BTD: jax.Array, voxels: Voxels) -> jax.Array:
    """The mean over the voxels of each cloud, [B, S, D]."""

    def of_row(x_TD: jax.Array, row: Voxels) -> jax.Array:
        zeros_SD = jnp.zeros((row.clouds, x_TD.shape[1]), x_TD.dtype)
        sum_SD = zeros_SD.at[row.cloud_T].add(x_TD, mode="drop")
        return sum_SD / jnp.maximum(row.count_S(), 1).astype(x_TD.dtype)[:, None]

    return jax.vmap(of_row)(x_BTD, voxels)


def build(
    model_config: Mapping[str, Any],
    *,
    classes: int,
    channels: int,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    clouds: int,
    per_voxel: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> PointCloud:
    """The model of a config's `model` section (without its name), with the options of
    `BlockOptions` for each operator and

    windows           (x, y, z) of each block, and of the last layer
    groups            voxels of a group, likewise
    pattern, mixers   operators, as in models/blocks/backbone.py, one after the other
    orders            of a layer, each with an operator: "x", "y" or "random"; (): no operators
    shifted_windows   whether the second layer of each pair has them
    fill_groups       whether last groups are filled up with copies (models/lion/orders.py)
    descriptor        the submanifold convolutions in front of merges
    generated         the share of the voxels that have copies, in merges between blocks
    growth            a cloud never has more than so many times the voxels that came

    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    supplied = (
        *("classes", "channels", "grid_x", "grid_y", "grid_z", "clouds", "per_voxel"),
        *("condition_width", "rngs", "param_dtype", "compute_dtype"),
    )
    check_options(
        "model point_cloud", "model", model_config, PointCloud, BlockOptions, supplied=supplied
    )
    return PointCloud(
        classes=classes,
        channels=channels,
        grid_x=grid_x,
        grid_y=grid_y,
        grid_z=grid_z,
        clouds=clouds,
        per_voxel=per_voxel,
        rngs=rngs,
        param_dtype=jnp.dtype(param_dtype),
        compute_dtype=jnp.dtype(compute_dtype),
        **model_config,
    )
