"""A classifier of images over a pattern of mixers: patches as tokens, one stage of blocks or a
pyramid of several, norm, head.

    logits = pooled(norm(stages(tokens(image)))) W + b

With mean pooling the mean over the tokens is taken after the norm; a class token stands before the
tokens of the last stage. A stage after the first begins by merging 2 x 2 tokens."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network, last_norm
from models.blocks.block import BlockOptions
from models.blocks.patches import Tokens, merging, stem_convolutions
from models.blocks.stack import Stack
from models.parts.options import Depth, Size, check_choice, check_options
from models.parts.projections import projection

BLOCK_OPTIONS = {field.name for field in dataclasses.fields(BlockOptions)}
# What a section of `stages` cannot say.
SUPPLIED = (
    *("before", "after", "channels", "grid", "class_token", "condition_width"),
    *("scan_layers", "remat", "rngs", "param_dtype", "compute_dtype"),
)


class Stage(nnx.Module):
    """A stage of a pyramid after the first: maps [B, Y, X, C] of the one before to tokens x_BTD.

    before, after: blocks of the network before and after those of this stage."""

    def __init__(
        self,
        *,
        width: Size,
        depth: Depth,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]],
        merge: str = "patches",
        positions: str = "none",
        before: int,
        after: int,
        channels: int,
        grid: tuple[int, int],
        class_token: bool,
        scan_layers: bool,
        remat: str,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **block: Any,
    ):
        common: dict[str, Any] = {
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        self.embedding = Tokens(
            merging(merge, width),
            channels,
            grid,
            positions=positions,
            class_token=class_token,
            **common,
        )
        self.stack = Stack(
            width,
            depth=depth,
            pattern=pattern,
            mixers=mixers,
            block=BlockOptions(**block),
            scan_layers=scan_layers,
            remat=remat,
            before=before,
            after=after,
            **common,
        )

    def __call__(self, map_BYXC: jax.Array, grid: tuple[int, int] | None) -> jax.Array:
        return self.stack(self.embedding(map_BYXC), None, grid=grid)[0]


class ImageClassifier(Backbone):
    """Images to logits of their classes; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_height: int,
        image_width: int,
        width: Size,
        depth: Depth,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]] | None = None,
        stem: str = "patches",
        patch: Size = 4,
        positions: str = "learned",
        position_grid: tuple[Size, ...] = (),
        pooling: str = "mean",
        stages: tuple[Mapping[str, Any], ...] = (),
        scan_layers: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        check_choice("pooling", pooling, ("mean", "class_token"))
        if len(position_grid) not in (0, 2):
            raise ValueError(f"position_grid must be () or (rows, columns); got {position_grid!r}")
        self.channels, self.patch, self.merges = channels, patch, len(stages)
        self.class_token = pooling == "class_token"
        own = self.grid_of(image_height, image_width)
        grid = (position_grid[0], position_grid[1]) if position_grid else own
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        shared: dict[str, Any] = {"scan_layers": scan_layers, "remat": remat, "rngs": rngs}
        block = {name: value for name, value in backbone.items() if name in BLOCK_OPTIONS}
        inherited = {"pattern": pattern, "mixers": mixers or {}, **block}
        sections = [_section(inherited, *numbered) for numbered in enumerate(stages)]
        super().__init__(
            Tokens(
                stem_convolutions(stem, patch, width),
                channels,
                grid,
                positions=positions,
                class_token=self.class_token and not sections,
                rngs=rngs,
                **dtypes,
            ),
            width=width,
            depth=depth,
            pattern=pattern,
            mixers=mixers,
            blocks_after=sum(section["depth"] for section in sections),
            **shared,
            **dtypes,
            **backbone,
        )
        self.stages = self.later_stages(sections, width, depth, grid, **shared, **dtypes)
        if sections:
            width, block = sections[-1]["width"], sections[-1]
            block = {name: value for name, value in block.items() if name in BLOCK_OPTIONS}
            options = BlockOptions(**block)
            self.norm = last_norm(options, width, rngs=rngs, param_dtype=param_dtype)
        head = functools.partial(projection, width, classes, ("embed", None), bias=True, rngs=rngs)
        self.head = head(param_dtype=param_dtype, compute_dtype=jnp.float32)

    def later_stages(
        self,
        sections: Sequence[Mapping[str, Any]],
        width: int,
        depth: int,
        grid: tuple[int, int],
        **shared: Any,
    ) -> nnx.List[Stage]:
        """The stages of a pyramid after the first, which has this width, depth and grid."""
        widths = [width, *(section["width"] for section in sections)]
        depths = [depth, *(section["depth"] for section in sections)]
        return nnx.List(
            Stage(
                **section,
                before=sum(depths[:number]),
                after=sum(depths[number + 1 :]),
                channels=widths[number - 1],
                grid=(grid[0] >> number, grid[1] >> number),
                class_token=self.class_token and number == len(sections),
                **shared,
            )
            for number, section in enumerate(sections, 1)
        )

    def __call__(self, image_BYXC: jax.Array) -> jax.Array:
        """Logits [B, classes] float32 of images [B, height, width, channels], as the task scales
        pixels; of any height and width that divide into patches and mergings, positions being
        resized."""
        return self.head(self.features(image_BYXC))

    def features(self, image_BYXC: jax.Array) -> jax.Array:
        """What the head reads, [B, D] float32."""
        if image_BYXC.ndim != 4 or image_BYXC.shape[3] != self.channels:
            raise ValueError(
                f"images must be [B, height, width, {self.channels}] as the model was made for; got"
                f" {image_BYXC.shape}"
            )
        rows, columns = self.grid_of(*image_BYXC.shape[1:3])

        def grid(number: int) -> tuple[int, int] | None:
            last_with_class = self.class_token and number == self.merges
            return None if last_with_class else (rows >> number, columns >> number)

        x_BTD, _ = self.hidden(image_BYXC, grid=grid(0))
        for number, stage in enumerate(self.stages):
            map_BYXD = x_BTD.reshape(len(x_BTD), rows >> number, columns >> number, -1)
            x_BTD = stage(map_BYXD, grid(number + 1))
        if self.class_token:
            return self.norm(x_BTD[:, 0])
        return jnp.mean(self.norm(x_BTD), axis=1)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the first stage's tokens. Raises ValueError for an image that does
        not divide."""
        step = self.patch << self.merges
        if height % step or width % step or not height or not width:
            raise ValueError(
                f"height and width of images must be multiples of {step} (patch {self.patch},"
                f" {self.merges} mergings of 2 x 2 tokens); got {height} x {width}"
            )
        return height // self.patch, width // self.patch


def _section(
    inherited: Mapping[str, Any], number: int, section: Mapping[str, Any]
) -> dict[str, Any]:
    """A section of `stages` with what it does not say as in the first stage; options of mixers
    likewise, one by one. Raises ValueError for an option that a stage does not have."""
    options = {**inherited, **section}
    check_options(
        f"stage {number + 1}",
        f"model.stages[{number}]",
        options,
        Stage,
        BlockOptions,
        supplied=SUPPLIED,
    )
    first = inherited["mixers"]
    mixers = {
        name: {**first.get(name, {}), **options["mixers"].get(name, {})}
        for name in dict.fromkeys((*first, *options["mixers"]))
    }
    return {**options, "mixers": mixers}


def build(
    model_config: Mapping[str, Any],
    *,
    classes: int,
    channels: int,
    height: int,
    width: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> ImageClassifier:
    """The model of a config's `model` section (without its name), for images of the given sizes,
    with the options of models/blocks/backbone.py and

    stem, patch      how patch x patch pixels become a token: models/blocks/patches.py
    positions        "learned", a table that is added to the tokens of the first stage and resized
                     for images of another size; or "none"
    position_grid    (rows, columns) of that table: those of a checkpoint whose images had another
                     size; () for the grid of this task's
    pooling          "mean" or "class_token"
    stages           the stages after the first, each a section with its width and depth, and where
                     they differ from the first's pattern, mixers (the options that differ) and
                     options of blocks; `merge` ("patches"), how 2 x 2 tokens become one, and
                     `positions` ("none") are its own

    Raises ValueError for unknown, missing or impossible options, with what is possible, and for
    images that do not divide into patches."""
    return build_network(
        ImageClassifier,
        "image_classifier",
        model_config,
        classes=classes,
        channels=channels,
        image_height=height,
        image_width=width,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
