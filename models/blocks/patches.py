"""How an image or a video becomes tokens, and how the next stage of a pyramid makes fewer:
convolutions, positions, a token for the class.

Letters: F frames, Y rows, X columns, C channels of a map [B, Y, X, C] or [B, F, Y, X, C]."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.batch_norm import BatchNorm
from models.parts.norms import layer_norm
from models.parts.options import check_choice
from models.parts.positions import grid_sinusoids, resized_table, sinusoids
from models.parts.projections import FAN_IN_UNIFORM, fan_in_bias, projection

TRUNCATED = nnx.initializers.truncated_normal(0.02)
ACTIVATIONS = {
    "none": lambda x: x,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
NORM_EPS = 1e-5


class Convolution(NamedTuple):
    """A convolution with a bias, a norm over channels and an activation."""

    kernel: int
    stride: int
    padding: int
    channels: int
    norm: str = "none"
    activation: str = "none"

    def extent(self, size: int) -> int:
        """Rows or columns of what it makes of `size` of them."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


def stem_convolutions(name: str, patch: int, width: int) -> tuple[Convolution, ...]:
    """The convolutions that make one token of `width` channels of every patch x patch pixels.

    patches         one, that sees each patch alone (ViT, arXiv 2010.11929)
    overlapping     two with LayerNorm, SiLU between (ViG, arXiv 2405.18425)
    halving         two of 3 x 3 and stride 2 with LayerNorm, GELU between (VMamba, ViG-H)
    halving_batch   three of 3 x 3 with BatchNorm and ReLU, 32 channels inside (SOFT)

    Raises ValueError for another name, or a patch that it cannot make."""
    check_choice("stem", name, ("patches", "overlapping", "halving", "halving_batch"))
    if name == "patches":
        return (Convolution(patch, patch, 0, width),)
    if name == "overlapping":
        if patch % 4:
            raise ValueError(f"patch must be a multiple of 4 for stem='overlapping'; got {patch}")
        first = Convolution(patch // 2 + 1, patch // 2, 1, width // 2, "layer", "silu")
        return (first, Convolution(3, 2, 1, width, "layer"))
    if patch != 4:
        raise ValueError(f"patch must be 4 for stem={name!r}; got {patch}")
    if name == "halving":
        return (
            Convolution(3, 2, 1, width // 2, "layer", "gelu"),
            Convolution(3, 2, 1, width, "layer"),
        )
    return tuple(
        Convolution(3, stride, 1, channels, "batch", "relu")
        for stride, channels in ((2, 32), (1, 32), (2, width))
    )


def merging(name: str, width: int) -> tuple[Convolution, ...]:
    """The convolution that makes one token of `width` channels of every 2 x 2; named as in
    `stem_convolutions`.

    Raises ValueError for another name."""
    kinds = {
        "patches": Convolution(2, 2, 0, width),
        "halving": Convolution(3, 2, 1, width, "layer"),
        "halving_batch": Convolution(3, 2, 1, width, "batch", "relu"),
    }
    check_choice("merge", name, tuple(kinds))
    return (kinds[name],)


class Tokens(nnx.Module):
    """Maps [B, Y, X, C], of any Y and X that divide, to tokens x_BTD, float32, in raster order.

    positions: "learned", a table for `grid` that is resized (bicubic) to the grid at hand;
    "sinusoidal", of rows and of columns (`grid_sinusoids`); or "none". With `class_token` a learned
    token stands before the others."""

    def __init__(
        self,
        convolutions: Sequence[Convolution],
        channels: int,
        grid: tuple[int, ...],
        *,
        positions: str,
        class_token: bool,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        check_choice("positions", positions, ("learned", "sinusoidal", "none"))
        self.sinusoidal = positions == "sinusoidal"
        self.grid, self.convolutions = grid, tuple(convolutions)
        self.compute_dtype = compute_dtype
        inputs = (channels, *(c.channels for c in convolutions[:-1]))
        self.layers = nnx.List(
            nnx.Conv(
                size,
                made.channels,
                (made.kernel, made.kernel),
                made.stride,
                padding=made.padding,
                kernel_init=FAN_IN_UNIFORM,
                kernel_metadata={"out_sharding": (None, None, None, "embed")},
                bias_metadata={"out_sharding": ("embed",)},
                dtype=compute_dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for size, made in zip(inputs, convolutions, strict=True)
        )
        common: dict[str, Any] = {"eps": NORM_EPS, "axis": "embed", "param_dtype": param_dtype}
        self.norms = nnx.List(
            layer_norm(made.channels, rngs=rngs, **common)
            if made.norm == "layer"
            else BatchNorm(made.channels, **common)
            for made in convolutions
            if made.norm != "none"
        )
        width = convolutions[-1].channels
        if self.sinusoidal and width % 4:
            raise ValueError(
                f"width must be a multiple of 4 for positions='sinusoidal'; got {width}"
            )
        table = {"out_sharding": (None, "embed"), "group": "no_decay"}

        def learned(rows: int) -> nnx.Param:
            return nnx.Param(TRUNCATED(rngs.params(), (rows, width), param_dtype), **table)

        self.positions_PD = learned(math.prod(grid)) if positions == "learned" else None
        self.class_1D = learned(1) if class_token else None

    def __call__(self, map_BYXC: jax.Array) -> jax.Array:
        map_BYXC, norms = map_BYXC.astype(self.compute_dtype), iter(self.norms)
        for layer, made in zip(self.layers, self.convolutions, strict=True):
            map_BYXC = layer(map_BYXC)
            if made.norm != "none":
                map_BYXC = next(norms)(map_BYXC).astype(self.compute_dtype)
            map_BYXC = ACTIVATIONS[made.activation](map_BYXC)
        batch, *grid, width = map_BYXC.shape
        x_BTD = map_BYXC.astype(jnp.float32).reshape(batch, -1, width)
        if self.positions_PD is not None:
            x_BTD += resized_table(self.positions_PD[...], self.grid, tuple(grid))[None]
        if self.sinusoidal:
            x_BTD += grid_sinusoids(grid[0], grid[1], width)[None]
        if self.class_1D is not None:
            class_B1D = jnp.broadcast_to(self.class_1D[...][None], (batch, 1, width))
            x_BTD = jnp.concatenate((class_B1D.astype(jnp.float32), x_BTD), axis=1)
        return x_BTD


class VideoTokens(nnx.Module):
    """Videos [B, F, Y, X, C], of any extents that divide, to tokens x_BTD, float32, the column
    fastest and the frame slowest: a linear map of patches (frames, rows, columns), plus sinusoids
    of the frame and of row and column. Raises ValueError for a width that is no multiple of 4."""

    def __init__(
        self,
        patch: tuple[int, ...],
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        if width % 4:
            raise ValueError(f"width must be a multiple of 4 for sinusoids; got {width}")
        inputs = math.prod(patch) * channels
        self.patch, self.compute_dtype = patch, compute_dtype
        self.map = projection(
            *(inputs, width),
            (None, "embed"),
            init=FAN_IN_UNIFORM,
            bias=True,
            bias_init=fan_in_bias(inputs),
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )

    def __call__(self, video_BFYXC: jax.Array) -> jax.Array:
        x_BTD = self.map(to_patches(video_BFYXC, self.patch).astype(self.compute_dtype))
        extents = zip(video_BFYXC.shape[1:4], self.patch, strict=True)
        frames, rows, columns = (extent // size for extent, size in extents)
        width = x_BTD.shape[-1]
        place_TD = jnp.repeat(sinusoids(jnp.arange(frames), width), rows * columns, axis=0)
        place_TD += jnp.tile(grid_sinusoids(rows, columns, width), (frames, 1))
        return x_BTD.astype(jnp.float32) + place_TD[None]


def to_patches(x: jax.Array, patch: Sequence[int]) -> jax.Array:
    """[B, T, P C] of a map [B, *extents, C]: patches in raster order, and in each its places."""
    batch, *extents, channels = x.shape
    n = len(patch)
    cut = [
        part for extent, size in zip(extents, patch, strict=True) for part in (extent // size, size)
    ]
    x = x.reshape(batch, *cut, channels)
    x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(batch, -1, math.prod(patch) * channels)


def from_patches(x_BTP: jax.Array, grid: Sequence[int], patch: Sequence[int]) -> jax.Array:
    """The inverse of `to_patches`, for a grid of patches: [B, *extents, C]."""
    n = len(patch)
    x = x_BTP.reshape(len(x_BTP), *grid, *patch, -1)
    pairs = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]
    x = x.transpose(0, *pairs, 2 * n + 1)
    extents = [count * size for count, size in zip(grid, patch, strict=True)]
    return x.reshape(len(x), *extents, -1)
