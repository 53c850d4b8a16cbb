"""LinGen. Wang et al., "LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with
Linear Computational Complexity", CVPR 2025: two branches in the place of the attention of a
diffusion Transformer of videos, one that walks over all tokens and one that looks around.

    y = MA(x) + TE(x)
    z = order_l(x),   u = f([means(z), z]) without the means,   MA = order_l^-1(u)
    f = Mamba-2 forwards + Mamba-2 backwards                    weights of their own
    TE = softmax attention within windows of frames, rows and columns, in odd layers shifted

    order_l    of layer l, "rotary-major scan": l mod 4 = 0: rows of frames, the column fastest;
               1: columns, the row fastest; 2: for each row and column in turn all frames; 3: for
               each column and row
    means      "review tokens": means of x over the parts of a coarse grid, in the same order
    q, k, v    of TE: x W + b,   K = width / H

Not causal, so there is no state; cost per token: that of two of Mamba-2, and O(window K H).

A window that is as long as its axis or longer becomes the axis, and is not shifted along it; other
axes are padded at their end. The shift is half of a window; tokens from both sides of an edge do
not see each other. An image is a video of one frame, and where there is no grid, tokens are a line,
which all orders leave as it is.

Ablations of the paper: scan="row_major" (order 0 in all layers), windows=() (MA alone), review=();
and of our own: mamba=False (TE alone), directions="forward".

Departures: the paper does not print the sizes of windows and of the coarse grid, nor the number of
heads; those here are ours. The walk backwards meets the means last, as the order says, and they
tell it nothing.

There is no code of the authors'.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.mamba2 import Mamba2
from models.parts.bidirectional import Bidirectional
from models.parts.options import Count, Factor, Size, check_choice
from models.parts.projections import XAVIER, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from models.parts.variables import LayerConstant
from ops.framework.grid import check_grid
from ops.shifted_window_attention.api import shifted_window_attention

# The axes (frame, row, column) of each order, the slowest first.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))
Grid = tuple[int, ...]  # frames, rows, columns


class LinGen(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        layer: jax.Array | int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        scan: str = "rotary",
        directions: str = "both",
        mamba: bool = True,
        windows: tuple[Size, ...] = (8, 4, 4),
        review: tuple[Size, ...] = (),
        heads: Size = 4,
        expand: Factor = 2.0,
        state_heads: Count = 0,
        state_size: Size = 64,
        conv_width: ConvWidth = 4,
    ):
        check_choice("scan", scan, ("rotary", "row_major"))
        check_choice("directions", directions, ("both", "forward"))
        for name, sizes in (("windows", windows), ("review", review)):
            if len(sizes) not in (0, 3):
                raise ValueError(f"{name} must be () or (frames, rows, columns); got {sizes!r}")
        if not (mamba or windows):
            raise ValueError("mamba must be True without windows: there would be no branch")
        head_size(width, heads)  # that they divide
        if state_heads:
            head_size(width, state_heads, expand, option="state_heads")
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.windows, self.review, self.heads = tuple(windows), tuple(review), heads
        self.layer = LayerConstant(jnp.asarray(layer, jnp.int32))
        self.rotary = scan == "rotary"

        def walk() -> Mamba2:
            return Mamba2(
                width,
                depth=depth,
                rngs=rngs,
                expand=expand,
                heads=state_heads,
                state_size=state_size,
                conv_width=conv_width,
                **dtypes,
            )

        both = functools.partial(Bidirectional, walk, width, depth=depth, rngs=rngs, **dtypes)
        self.walk: Any = None if not mamba else both() if directions == "both" else walk()
        dense = functools.partial(
            projection, width, width, init=XAVIER, bias=True, rngs=rngs, **dtypes
        )
        self.query = dense(("embed", "heads")) if windows else None
        self.key = dense(("embed", "heads")) if windows else None
        self.value = dense(("embed", "heads")) if windows else None
        self.output = dense(("heads", "embed")) if windows else None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, None]:
        if segment_ids is not None and (grid is not None or self.review or self.windows):
            raise ValueError("segment_ids must be None on a grid, with review tokens or windows")
        given = (x_BTD.shape[1],) if grid is None else check_grid(grid, x_BTD.shape[1])
        whole = (*(1,) * (3 - len(given)), *given)
        branches = []
        if self.walk is not None:
            branches.append(self.walked(x_BTD, whole, segment_ids))
        if self.windows:
            branches.append(self.windowed(x_BTD, whole))
        return functools.reduce(jnp.add, branches), None

    def walked(self, x_BTD: jax.Array, grid: Grid, segment_ids: jax.Array | None) -> jax.Array:
        """MA(x)."""
        order = self.layer[...] % len(ORDERS) if self.rotary else 0
        z_BTD = in_order(x_BTD, grid, order)
        if self.review:
            means_BRD = in_order(coarse(x_BTD, grid, self.review), self.review, order)
            z_BTD = jnp.concatenate((means_BRD, z_BTD), axis=1)
        u_BTD, _ = self.walk(z_BTD, segment_ids=segment_ids)
        return from_order(u_BTD[:, z_BTD.shape[1] - x_BTD.shape[1] :], grid, order)

    def windowed(self, x_BTD: jax.Array, grid: Grid) -> jax.Array:
        """TE(x)."""
        assert self.query is not None and self.key is not None
        assert self.value is not None and self.output is not None
        window = tuple(min(size, extent) for size, extent in zip(self.windows, grid, strict=True))
        shift = tuple(
            0 if size == extent else size // 2 for size, extent in zip(window, grid, strict=True)
        )
        behind = [-extent % size for size, extent in zip(window, grid, strict=True)]
        padded = tuple(extent + more for extent, more in zip(grid, behind, strict=True))
        there = None
        if any(behind):
            ones_BT1 = jnp.ones((*x_BTD.shape[:2], 1), bool)
            there = _padded(ones_BT1, grid, behind)[..., 0]
        qkv = tuple(
            split_heads(_padded(dense(x_BTD), grid, behind), self.heads)
            for dense in (self.query, self.key, self.value)
        )

        def attention(qkv: tuple[jax.Array, ...], shift: tuple[int, ...]) -> jax.Array:
            return shifted_window_attention(
                *qkv, grid=padded, window=window, shift=shift, key_mask=there
            )

        in_place = functools.partial(attention, shift=(0, 0, 0))
        shifted = functools.partial(attention, shift=shift)
        o_BTHK = jax.lax.cond(self.layer[...] % 2 == 1, shifted, in_place, qkv)
        o_BTD = merge_heads(o_BTHK).reshape(len(x_BTD), *padded, -1)
        o_BTD = o_BTD[:, : grid[0], : grid[1], : grid[2]].reshape(x_BTD.shape)
        return self.output(o_BTD)


def _padded(x_BTD: jax.Array, grid: Grid, behind: list[int]) -> jax.Array:
    """Tokens of the grid with as many places behind each axis, zeros."""
    batch, _, width = x_BTD.shape
    x = x_BTD.reshape(batch, *grid, width)
    x = jnp.pad(x, ((0, 0), *((0, more) for more in behind), (0, 0)))
    return x.reshape(batch, -1, width)


def in_order(x_BTD: jax.Array, grid: Grid, order: jax.Array | int) -> jax.Array:
    """The tokens of a grid (frames, rows, columns) in raster order, in one of ORDERS."""

    def transposed(axes: tuple[int, ...], x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.reshape(len(x_BTD), *grid, -1)
        return x.transpose(0, *(1 + axis for axis in axes), 4).reshape(x_BTD.shape)

    return _chosen(transposed, order, x_BTD)


def from_order(z_BTD: jax.Array, grid: Grid, order: jax.Array | int) -> jax.Array:
    """The inverse of `in_order`."""

    def transposed(axes: tuple[int, ...], z_BTD: jax.Array) -> jax.Array:
        z = z_BTD.reshape(len(z_BTD), *(grid[axis] for axis in axes), -1)
        back = (1 + axes.index(axis) for axis in range(3))
        return z.transpose(0, *back, 4).reshape(z_BTD.shape)

    return _chosen(transposed, order, z_BTD)


def _chosen(transposed: Any, order: jax.Array | int, x_BTD: jax.Array) -> jax.Array:
    if isinstance(order, int):
        return transposed(ORDERS[order], x_BTD)
    each = [functools.partial(transposed, axes) for axes in ORDERS]
    return jax.lax.switch(order, each, x_BTD)


def coarse(x_BTD: jax.Array, grid: Grid, parts: Grid) -> jax.Array:
    """Means over the parts of a grid that is cut into `parts` along each axis, [B, R, D], float32
    sums. Raises ValueError for parts that do not divide the grid."""
    if any(extent % count for extent, count in zip(grid, parts, strict=True)):
        raise ValueError(f"review must divide the grid {grid}; got {parts}")
    cut = [size for n, extent in zip(parts, grid, strict=True) for size in (n, extent // n)]
    x = x_BTD.reshape(len(x_BTD), *cut, -1).astype(jnp.float32)
    means = x.mean(axis=(2, 4, 6)).reshape(len(x_BTD), math.prod(parts), -1)
    return means.astype(x_BTD.dtype)


def adjacency(grid: Grid, orders: tuple[int, ...]) -> float:
    """How far apart neighbours of a grid are on a line: the mean over all pairs of neighbours of
    the least distance that they have in any of these orders."""
    places = jnp.arange(math.prod(grid)).reshape(1, -1, 1)
    where = [jnp.argsort(in_order(places, grid, order)[0, :, 0]).reshape(grid) for order in orders]
    found = []
    for axis in range(3):
        apart = jnp.stack([jnp.abs(jnp.diff(place, axis=axis)) for place in where])
        found.append(apart.min(axis=0).reshape(-1))
    return float(jnp.concatenate(found).mean())


Mixer = LinGen
