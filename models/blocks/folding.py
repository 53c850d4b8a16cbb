"""Norms of batches that become part of the linear maps behind them, for models that have learned.

    norm(x) W + b = x (diag(g) W) + (b + shift W)       norm(x) = g x + shift under `model.eval()`

(SLAB: Guo et al., ICML 2024, arXiv 2405.11582, section 3.2.) What is left of the norm is the
identity, and no token needs statistics."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.blocks.batch_norm import BatchNorm, ProgressiveBatchNorm, RepBatchNorm
from models.blocks.block import Block
from models.parts.norms import Identity

FOLDING = (BatchNorm, ProgressiveBatchNorm, RepBatchNorm)


def fold_norms(classifier: Any) -> None:
    """Folds the norms of a classifier's blocks and its last one into the maps that read them.

    Its outputs under `model.eval()` stay what they were, to rounding; it is not to be trained
    further. A mixer names the maps that alone read its input in `reads_input`. Raises ValueError
    for norms that are not of batches, or that stand in front of something else."""
    found = [*_readers(classifier)]
    for owner, name, readers in found:
        norm = getattr(owner, name)
        if not isinstance(norm, FOLDING):
            raise ValueError(
                "only norms of batches fold: norm must be 'batch', 'rep_batch' or"
                f" 'progressive_batch'; got {type(norm).__name__}"
            )
        if not readers:
            raise ValueError(
                f"the mixer {type(owner.mixer).__name__} does not name the maps that read its"
                " input (reads_input): its norm cannot be folded"
            )
    for owner, name, readers in found:
        g, shift = getattr(owner, name).affine()
        for linear in readers:
            _absorb(linear, g, shift)
        setattr(owner, name, Identity())


def _readers(classifier: Any) -> Iterator[tuple[Any, str, list[nnx.Linear]]]:
    """(module, name of its norm, the maps that read the norm), all over the network."""
    for stack in (classifier.stack, *(stage.stack for stage in classifier.stages)):
        for block in (*stack.period, *stack.remainder):
            yield from _readers_of_block(block)
    if not isinstance(classifier.norm, Identity):
        # The mean over tokens commutes with what is the same for each of them.
        yield classifier, "norm", [classifier.head]


def _readers_of_block(block: Block) -> Iterator[tuple[Any, str, list[nnx.Linear]]]:
    if not block.pre_norm:
        raise ValueError("pre_norm must be True: a norm behind a sum has no map to fold into")
    names = getattr(block.mixer, "reads_input", ())
    yield block, "mixer_norm", [getattr(block.mixer, name) for name in names]
    if block.mlp is not None:
        both = (getattr(block.mlp, name, None) for name in ("gate", "up"))
        yield block, "mlp_norm", [linear for linear in both if linear is not None]


def _absorb(linear: nnx.Linear, g: Any, shift: Any) -> None:
    """Makes a map of x of one of g x + shift; all with or without a leading axis of layers."""
    kernel = linear.kernel[...].astype(jnp.float32)
    added = jnp.einsum("...d,...dm->...m", shift, kernel)
    if linear.bias is not None:
        linear.bias[...] = (linear.bias[...] + added).astype(linear.bias[...].dtype)
    else:
        axes = linear.kernel.get_metadata().get("out_sharding") or (None,) * kernel.ndim
        sharding = (*axes[:-2], axes[-1])
        bias = nnx.Param(added.astype(linear.kernel[...].dtype), out_sharding=sharding)
        linear.bias, linear.use_bias = nnx.data(bias), True
    linear.kernel[...] = (g[..., None] * kernel).astype(linear.kernel[...].dtype)
