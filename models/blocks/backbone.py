"""What networks share: an embedding, a stack of residual blocks over a pattern of mixers, a norm.

    x = stack(dropout(embedding(inputs)));    a network's head reads norm(x)

A network is a `Backbone` with a head of its own. Its parameters lie at `embedding`,
`stack/period/<i>`, `stack/remainder/<i>`, `norm` and where its head puts them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.block import BlockOptions
from models.blocks.stack import Stack
from models.parts.norms import Identity
from models.parts.options import Depth, Probability, Size, check_options

Network = TypeVar("Network", bound="Backbone")


class Backbone(nnx.Module):
    """Inputs to the residual stream after the last block.

    embedding            module that turns a network's inputs into x_BTD, float32
    width, depth         model width and number of blocks
    pattern              mixers by file name, repeated over the depth: ("gla", "window_attention")
    mixers               options per mixer: {"gla": {"heads": 2}}; it may list mixers that the
                         pattern lacks
    embedding_dropout    off under `model.eval()`, on under `model.train()`
    scan_layers          a loop over layers (one compilation per distinct block), or straight-line
                         code; equal numbers
    remat                "none", "full" or "dots": what the backward pass recomputes per block
    condition_width      size of the vector that conditions every block, 0 for none; the network
                         sets it, not the config
    blocks_after         likewise: the blocks of further stacks that a network puts behind this one
    block                the other fields of `BlockOptions`
    """

    def __init__(
        self,
        embedding: nnx.Module,
        *,
        width: Size,
        depth: Depth,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]] | None = None,
        embedding_dropout: Probability = 0.0,
        scan_layers: bool = True,
        remat: str = "none",
        condition_width: int = 0,
        blocks_after: int = 0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **block: Any,
    ):
        options = BlockOptions(condition_width=condition_width, **block)
        self.compute_dtype = compute_dtype
        self.embedding: Any = embedding
        # A model without dropout carries no random state.
        self.dropout = nnx.Dropout(embedding_dropout, rngs=rngs) if embedding_dropout else None
        self.stack = Stack(
            width,
            depth=depth,
            pattern=pattern,
            mixers=mixers or {},
            block=options,
            scan_layers=scan_layers,
            remat=remat,
            after=blocks_after,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.norm = last_norm(options, width, rngs=rngs, param_dtype=param_dtype)

    def hidden(
        self,
        inputs: jax.Array,
        state: Mapping[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        condition: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
        mask: jax.Array | None = None,
        keeps: str = "nothing",
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The residual stream x_BTD after the last block, float32, and the state after it.

        Not normalised yet, so that a head that reads few tokens applies `norm` to those alone.
        Arguments as in `Stack`."""
        x_BTD = self.embedding(inputs)
        if self.dropout is not None:
            x_BTD = self.dropout(x_BTD)
        return self.stack(
            x_BTD,
            state,
            positions=positions,
            segment_ids=segment_ids,
            condition=condition,
            grid=grid,
            mask=mask,
            keeps=keeps,
        )


def last_norm(options: BlockOptions, width: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> Any:
    """The norm behind the last block; blocks that end with a norm leave nothing to do for it."""
    if not options.pre_norm:
        return Identity()
    return options.make_norm(width, rngs=rngs, param_dtype=param_dtype)


def token_embedding(
    vocabulary: int, width: int, *, std: float, rngs: nnx.Rngs, param_dtype: DTypeLike
) -> nnx.Embed:
    """A table [vocabulary, width] that starts as N(0, std^2): int tokens [B, T] to x_BTD, float32.

    Raises ValueError unless std > 0."""
    if std <= 0.0:
        raise ValueError(f"embedding_std must be greater than 0; got {std}")
    return nnx.Embed(
        vocabulary,
        width,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        embedding_init=nnx.initializers.normal(std),
        embedding_metadata={"out_sharding": ("vocabulary", "embed")},
        rngs=rngs,
    )


def build_network(
    network: type[Network],
    name: str,
    model_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
    **sizes: int,
) -> Network:
    """The network of a config's `model` section (without its name), for data of the given sizes.

    Its options are those of `network`, of `Backbone` and of `BlockOptions`. Raises ValueError for
    unknown, missing or impossible options, with what is possible."""
    supplied = (*sizes, "condition_width", "blocks_after", "rngs", "param_dtype", "compute_dtype")
    check_options(
        f"model {name}", "model", model_config, network, Backbone, BlockOptions, supplied=supplied
    )
    return network(
        **sizes,
        rngs=rngs,
        param_dtype=jnp.dtype(param_dtype),
        compute_dtype=jnp.dtype(compute_dtype),
        **model_config,
    )
