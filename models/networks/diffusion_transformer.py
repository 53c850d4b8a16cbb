"""DiT: noisy images or videos, a time and a class to what was added to them, over a pattern of
mixers.
Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv 2212.09748.

    c = W_2 silu(W_1 waves(time) + b_1) + b_2 + table[class]
    x = blocks(patches(image) + positions, c)            adaLN-Zero (models/blocks/block.py)
    [shift, scale] = silu(c) W + b
    y = patches^-1((norm(x) (1 + scale) + shift) W_o + b_o)

    waves      cosines and sines of time at 128 frequencies each
    table      a row for each class, and one more, of index `classes`, that stands for none: what
               guidance without a classifier reads

A video is cut into patches of frames, rows and columns, and its positions have the sinusoids of
frames besides.

All that writes to the stream starts at 0: a fresh block is the identity, and y is 0. Positions are
sinusoids of row and column, so that images of any size are read.

Departures: first values of the patches' map are U(+-fan_in^-1/2), where the authors have Xavier's;
the pixels of a patch and their channels are ordered as [row,
column, channel].

Authors' code: https://github.com/facebookresearch/DiT
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network
from models.blocks.patches import Tokens, VideoTokens, from_patches, stem_convolutions
from models.parts.options import Depth, Size
from models.parts.positions import sinusoids
from models.parts.projections import NORMAL, ZEROS, projection

WAVES = 256  # numbers that say a time


class Condition(nnx.Module):
    """Times [B] float and classes [B] int to c [B, D], float32."""

    def __init__(self, classes: int, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike):
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=jnp.float32
        )
        self.first = dense(WAVES, width, (None, "embed"))
        self.second = dense(width, width, (None, "embed"))
        table_CD = NORMAL(rngs.params(), (classes + 1, width), param_dtype)
        self.table_CD = nnx.Param(table_CD, out_sharding=(None, "embed"))

    def __call__(self, time_B: jax.Array, class_B: jax.Array) -> jax.Array:
        time_BD = self.second(jax.nn.silu(self.first(sinusoids(time_B, WAVES))))
        return time_BD + self.table_CD[...].astype(jnp.float32)[class_B]


class DiffusionTransformer(Backbone):
    """Images or videos, times and classes to the same; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        output_channels: int,
        image_height: int,
        image_width: int,
        width: Size,
        depth: Depth,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]] | None = None,
        image_frames: int = 0,
        patch: Size = 2,
        patch_frames: Size = 1,
        teacher: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        self.classes, self.channels, self.output_channels = classes, channels, output_channels
        self.patch = (patch, patch) if not image_frames else (patch_frames, patch, patch)
        if patch_frames > 1 and not image_frames:
            raise ValueError(f"patch_frames must be 1 for images; got {patch_frames}")
        frames = (image_frames,) if image_frames else ()
        grid = self.grid_of(*frames, image_height, image_width)
        common: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        if image_frames:
            embedding: Any = VideoTokens(self.patch, channels, width, rngs=rngs, **dtypes)
        else:
            embedding = Tokens(
                stem_convolutions("patches", patch, width),
                channels,
                grid,
                positions="sinusoidal",
                class_token=False,
                rngs=rngs,
                **dtypes,
            )
        super().__init__(
            embedding,
            width=width,
            depth=depth,
            pattern=pattern,
            mixers=mixers,
            condition_width=width,
            compute_dtype=compute_dtype,
            **common,
            **backbone,
        )
        self.condition = Condition(classes, width, **common)
        zeros = functools.partial(
            projection, width, init=ZEROS, bias=True, compute_dtype=jnp.float32, **common
        )
        self.modulation = zeros(2 * width, (None, "embed"))
        self.head = zeros(math.prod(self.patch) * output_channels, ("embed", None))
        sizes: dict[str, Any] = {
            "classes": classes,
            "channels": channels,
            "output_channels": output_channels,
            "height": image_height,
            "width": image_width,
            "frames": image_frames,
        }
        self.teacher = build(teacher, rngs=rngs, **dtypes, **sizes) if teacher else None

    def __call__(self, image: jax.Array, time_B: jax.Array, class_B: jax.Array) -> jax.Array:
        """float32 [B, height, width, output_channels] of noisy images [B, height, width, channels]
        of any height and width that divide into patches; times float [B], 0 (no noise) to 1000 (all
        noise); classes int [B], `classes` for none. Of videos [B, frames, height, width, ...]."""
        return self.with_outputs(image, time_B, class_B)[0]

    def with_outputs(
        self, image: jax.Array, time_B: jax.Array, class_B: jax.Array, keeps: str = "outputs"
    ) -> tuple[jax.Array, jax.Array]:
        """The same, and what the mixers returned: [L, B, T, D], a layer after the other, those of
        the scanned period first by their place in it. With keeps="attention", what their output
        maps read."""
        names = ("frames", "height", "width")[-len(self.patch) :]
        if image.ndim != len(names) + 2 or image.shape[-1] != self.channels:
            raise ValueError(
                f"images must be [B, {', '.join(names)}, {self.channels}] as the model was made"
                f" for; got {image.shape}"
            )
        for name, array in (("times", time_B), ("classes", class_B)):
            if array.shape != image.shape[:1]:
                raise ValueError(
                    f"{name} must be [B] with B={len(image)} of images; got {array.shape}"
                )
        grid = self.grid_of(*image.shape[1:-1])
        condition_BD = self.condition(time_B, class_B)
        x_BTD, kept = self.hidden(image, condition=condition_BD, grid=grid, keeps=keeps)
        outputs = [block.output for block in kept["period"]]
        outputs += [block.output[None] for block in kept["remainder"]]
        modulation_B1M = self.modulation(jax.nn.silu(condition_BD))[:, None]
        shift_B1D, scale_B1D = jnp.split(modulation_B1M, 2, axis=-1)
        pixels_BTP = self.head(self.norm(x_BTD) * (1 + scale_B1D) + shift_B1D)
        said = from_patches(pixels_BTP, grid, self.patch)
        return said, jnp.concatenate(outputs)

    def grid_of(self, *extents: int) -> tuple[int, ...]:
        """Rows and columns of tokens of an image, or frames, rows and columns of a video. Raises
        ValueError for extents that do not divide."""
        if any(not x or x % size for x, size in zip(extents, self.patch, strict=True)):
            names, patch = "height and width of images", f"patch={self.patch[-1]}"
            if len(extents) == 3:
                names = "frames, height and width of videos"
                patch = f"(patch_frames, patch, patch)={self.patch}"
            raise ValueError(
                f"{names} must be multiples of {patch}; got {' x '.join(map(str, extents))}"
            )
        return tuple(x // size for x, size in zip(extents, self.patch, strict=True))


def build(
    model_config: Mapping[str, Any],
    *,
    classes: int,
    channels: int,
    output_channels: int,
    height: int,
    width: int,
    frames: int = 0,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> DiffusionTransformer:
    """The model of a config's `model` section (without its name), for images of the given sizes,
    or with `frames` for videos, with the options of models/blocks/backbone.py and

    patch      patch x patch pixels become a token
    patch_frames
               of videos, of as many frames
    teacher    a section like this one: a second network, which this one's objective may ask and
               nothing else does. config.init_from gives it what its run has learned, and
               config.optimizer.frozen=("teacher/.*",) lets it stay as it is. Its parameters count
               among those of the run

    Raises ValueError for unknown, missing or impossible options, with what is possible, and for
    images that do not divide into patches."""
    return build_network(
        DiffusionTransformer,
        "diffusion_transformer",
        model_config,
        classes=classes,
        channels=channels,
        output_channels=output_channels,
        image_height=height,
        image_width=width,
        image_frames=frames,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
