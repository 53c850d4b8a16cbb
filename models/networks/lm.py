"""A language model over a pattern of mixers: embedding, a stack of residual blocks, norm, head.

    logits = norm(stack(embedding[tokens])) W_head^T            W_head = the embedding itself with
    tie_embeddings

Training, prefill and decoding are the same call; the state of the mixers is all that a prefix
leaves behind. The embedding starts as N(0, embedding_std^2), other parameters as N(0, 0.02^2) where
the mixer's paper says nothing else. Logits are float32, also under a bfloat16 compute dtype:
products of compute-dtype numbers, summed in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.networks.stack import Stack
from models.parts.norms import rms_norm
from models.parts.options import check_options
from models.parts.projections import NORMAL


class LM(nnx.Module):
    """Tokens to logits of the next token; see `build` for the options."""

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        depth: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Mapping[str, Any]],
        mlp: str = "swiglu",
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        embedding_std: float = 0.02,
        embedding_dropout: float = 0.0,
        scan_layers: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        if not 0.0 <= embedding_dropout < 1.0:
            raise ValueError(f"embedding_dropout must be in [0, 1); got {embedding_dropout}")
        if embedding_std <= 0.0:
            raise ValueError(f"embedding_std must be greater than 0; got {embedding_std}")
        self.compute_dtype = compute_dtype
        self.embedding = nnx.Embed(
            vocabulary_size,
            width,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(embedding_std),
            embedding_metadata={"out_sharding": ("vocabulary", "embed")},
            rngs=rngs,
        )
        # A model without dropout carries no random state.
        self.dropout = nnx.Dropout(embedding_dropout, rngs=rngs) if embedding_dropout else None
        self.stack = Stack(
            width,
            depth=depth,
            pattern=pattern,
            mixers=mixers,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            scan_layers=scan_layers,
            remat=remat,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.norm = rms_norm(width, eps=norm_eps, axis="embed", rngs=rngs, param_dtype=param_dtype)
        if tie_embeddings:
            self.head_WD = None
        else:
            head_WD = NORMAL(rngs.params(), (vocabulary_size, width), param_dtype)
            self.head_WD = nnx.Param(head_WD, out_sharding=("vocabulary", "embed"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        state: Mapping[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        readout_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits [B, T, W] float32 and the state after the last token.

        tokens_BT int [B, T]; `state` from `init_state` or an earlier call (None: the zero state);
        `positions` int [B, T] (None: counted on from the state); `segment_ids` int [B, T]: the
        state resets where the id changes, also for left padding, which is a segment of its own.
        With `readout_positions` int [B, N], indices into this call's T tokens, the logits are
        computed there alone: [B, N, W]."""
        x_BTD = self.embedding(tokens_BT)
        if self.dropout is not None:
            x_BTD = self.dropout(x_BTD)
        x_BTD, state = self.stack(x_BTD, state, positions=positions, segment_ids=segment_ids)
        if readout_positions is not None:
            x_BTD = jnp.take_along_axis(x_BTD, readout_positions[:, :, None], axis=1)
        x_BTD = self.norm(x_BTD).astype(self.compute_dtype)
        head = self.embedding.embedding if self.head_WD is None else self.head_WD
        head_WD = head[...].astype(self.compute_dtype)
        return (
            jnp.einsum("btd,wd->btw", x_BTD, head_WD, preferred_element_type=jnp.float32),
            state,
        )

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token of `batch` sequences."""
        return self.stack.init_state(batch)

    @property
    def state_bytes(self) -> int:
        """Bytes of state per sequence, all layers together."""
        return self.stack.state_bytes


def build(
    model_config: Mapping[str, Any],
    *,
    vocabulary_size: int,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> LM:
    """The model of a config's `model` section (without its name).

    width, depth          model width and number of blocks
    pattern               mixers by file name, repeated over the depth: ("delta_net",
                          "window_attention")
    mixers                options per mixer: {"delta_net": {"heads": 2}}; mixers that the pattern
                          lacks may be listed
    mlp, mlp_ratio        "swiglu" or "none"; inner width about 2/3 * mlp_ratio * width
    norm_eps              of the block norms and the last norm
    tie_embeddings        the head is the embedding
    embedding_dropout     off under `model.eval()`, on under `model.train()`
    scan_layers           a loop over layers (one compilation per distinct block), or straight-line
                          code; equal numbers
    remat                 "none", "full" or "dots": what the backward pass recomputes per block

    Raises ValueError for unknown, missing or impossible options, with what is possible.
    """
    options = {"mixers": {}, **model_config}
    check_options(
        "model lm",
        "model",
        options,
        LM,
        supplied=("vocabulary_size", "param_dtype", "compute_dtype", "rngs"),
    )
    dtypes: dict[str, Any] = {
        "param_dtype": jnp.dtype(param_dtype),
        "compute_dtype": jnp.dtype(compute_dtype),
    }
    return LM(vocabulary_size=vocabulary_size, rngs=rngs, **dtypes, **options)
