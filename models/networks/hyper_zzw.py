"""Terminator, the network of HyperZ.Z.W. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks
for Full Context Interaction", 2024, arXiv 2401.17948.

Slow networks generate kernels W as large as the feature map from the coordinates of its places.
Activations Z times kernels are weights that depend on the input, and these meet the activations
again: every place sees all others in every layer, without attention, residual connections or
learned scales.

    x = image (or x W_0 + b_0 with `lift`)
    each block:   x = block(x, earlier outputs) + b          models/blocks/hyper_block.py
    logits = (mean of x over the places + b) W + b'

    slow loss     sum over pairs of blocks j < i of the mean over the places of
                  (sum_c K_g^i - sum_c K_g^j)^2, or with slow_loss="tiled" that of
                  (K_g^i - K_g^j repeated)^2 over places and channels

    K_g     models/blocks/hyper_kernels.py        global kernels [T, C], one for each block
    G-IBS   models/blocks/standardisation.py      normalisation by groups

Block i from the third on also reads the output of block i - 2, from the fifth on that of block
i - 3. The number of places never changes, that of channels is multiplied in each block. The slow
loss is an auxiliary loss, reported to the trainer.

Images are read as images of equal sides, or with sequence=True as a sequence of their pixels, whose
kernels have one coordinate. Cost of the global operator per channel: T^(3/2) for an image, of a
sequence T log T.

Statistics of the batch are part of the model, also of its predictions: what is said of an image
depends on the others in its batch, of which an evaluation makes batches as large as those of
training. Rows that only fill a batch up are never among them. statistics="running" and norm="batch"
together make a prediction that depends on the image alone.

Departures: one-dimensional data is not in the released code; its global operator, a circular
convolution, is ours. The penalty of the released training on norms of parameters is not there.
First values that are not published are PyTorch's. The frequencies of slow networks are parameters
without decay.

Authors' code: https://github.com/hyperevolnet/Terminator"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.hyper_block import (
    KAIMING_NORMAL,
    LOCAL_STEPS,
    HyperBlock,
    HyperOptions,
    linear,
    repeated,
    scalar,
)
from models.parts.options import Count, Probability, Size, Weight, check_choice, check_options
from models.parts.variables import AUXILIARY_LOSS, report

FIRST_STEPS = 3  # of the slow network of the first block's global kernel


class HyperZZW(nnx.Module):
    """Images to logits of their classes; see `build` for the options."""

    causal = False
    # What it says of a row depends on the rows beside it: it must be told which are there.
    reads_batch = True

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_height: int,
        image_width: int,
        factors: tuple[Size, ...] = (4, 3, 2, 2, 2),
        lift: Count = 0,
        sequence: bool = False,
        dropout: Probability = 0.05,
        slow_loss: str = "summed",
        slow_loss_weight: Weight = 1.0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **block: Any,
    ):
        check_choice("slow_loss", slow_loss, ("summed", "tiled"))
        if not factors:
            raise ValueError("factors must have one for each block, at least one; got ()")
        if not sequence and image_height != image_width:
            raise ValueError(
                "sequence must be True for images of unequal sides, which are not multiplied as"
                f" matrices; got {image_height} x {image_width}"
            )
        options = HyperOptions(**block)
        self.image, self.slow_loss = (image_height, image_width, channels), slow_loss
        self.slow_loss_weight = slow_loss_weight * options.hyper_kernels
        self.compute_dtype = compute_dtype
        shape = (image_height * image_width,) if sequence else (image_height, image_width)
        given: dict[str, Any] = {
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        self.lift = linear(channels, lift, **given) if lift else None
        widths = [lift or channels]
        for factor in factors:
            widths.append(widths[-1] * factor)
        self.blocks = nnx.List(
            HyperBlock(
                widths[number],
                widths[number + 1],
                shape=shape,
                earlier=tuple(widths[before + 1] for before in earlier_blocks(number)),
                steps=LOCAL_STEPS if number else FIRST_STEPS,
                dropout=dropout if number else 0.0,
                options=options,
                **given,
            )
            for number in range(len(factors))
        )
        self.shifts = nnx.List(scalar(param_dtype) for _ in factors)
        self.head = linear(
            widths[-1], classes, init=KAIMING_NORMAL, **{**given, "compute_dtype": jnp.float32}
        )

    def __call__(self, image_BYXC: jax.Array, there_B: jax.Array | None = None) -> jax.Array:
        """Logits [B, classes] float32 of images [B, height, width, channels].

        there bool [B]: the rows that there are, None for all; the others change nothing, and what
        is said of them means nothing. Raises ValueError for images of another size."""
        if image_BYXC.shape[1:] != self.image:
            raise ValueError(
                f"images must be [B, {', '.join(map(str, self.image))}] as the model was made for;"
                f" got {image_BYXC.shape}"
            )
        x_BTC = image_BYXC.astype(jnp.float32).reshape(len(image_BYXC), -1, self.image[2])
        if there_B is not None:
            x_BTC = jnp.where(there_B[:, None, None], x_BTC, 0.0)
        if self.lift is not None:
            x_BTC = self.lift(x_BTC).astype(jnp.float32)
        outputs: list[jax.Array] = []
        kernels: list[jax.Array] = []
        for number, (block, shift) in enumerate(zip(self.blocks, self.shifts, strict=True)):
            earlier = tuple(outputs[before] for before in earlier_blocks(number))
            x_BTC, kernel_TC = block(x_BTC, earlier, there_B)
            outputs.append(x_BTC)
            kernels.append(kernel_TC)
            last = number == len(self.blocks) - 1
            pooled = jnp.mean(x_BTC, axis=1) if last else x_BTC
            x_BTC = pooled + shift[...].astype(jnp.float32)
        if self.slow_loss_weight:
            loss = self.slow_loss_weight * slow_loss(kernels, tiled=self.slow_loss == "tiled")
            report(self, **{AUXILIARY_LOSS: loss})
        return self.head(x_BTC)


def earlier_blocks(number: int) -> tuple[int, ...]:
    """The blocks before the last one whose outputs a block reads, too."""
    return (number - 2,) * (number >= 2) + (number - 3,) * (number >= 4)


def slow_loss(kernels: list[jax.Array], *, tiled: bool) -> jax.Array:
    """How far the global kernels [T, C] of blocks are apart, summed over their pairs: []."""
    total = jnp.zeros(())
    for number, deep_TC in enumerate(kernels):
        for shallow_TC in kernels[:number]:
            if tiled:
                channels = deep_TC.shape[1]
                apart = deep_TC - repeated(shallow_TC[None], channels)[0]
            else:
                apart = jnp.sum(deep_TC, axis=1) - jnp.sum(shallow_TC, axis=1)
            total += jnp.mean(jnp.square(apart))
    return total


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
) -> HyperZZW:
    """The model of a config's `model` section (without its name), for images of the given sizes,
    with the options of `HyperOptions` (models/blocks/hyper_block.py) and

    factors             by which each block multiplies the channels
    lift                channels that pixels are mapped to first; 0: they are not
    sequence            whether pixels are a sequence, row by row
    dropout             of whole channels behind each block but the first
    slow_loss           "summed" or "tiled"
    slow_loss_weight    what it is multiplied by; 0: there is none

    Raises ValueError for unknown or impossible options, with what is possible."""
    sizes: dict[str, Any] = {
        "classes": classes,
        "channels": channels,
        "image_height": height,
        "image_width": width,
    }
    supplied = (*sizes, "rngs", "param_dtype", "compute_dtype")
    check_options(
        "model hyper_zzw", "model", model_config, HyperZZW, HyperOptions, supplied=supplied
    )
    return HyperZZW(
        **sizes,
        rngs=rngs,
        param_dtype=jnp.dtype(param_dtype),
        compute_dtype=jnp.dtype(compute_dtype),
        **model_config,
    )
