"""A language model over a pattern of mixers: embedding, a stack of residual blocks, norm, head.

    logits = norm(stack(embedding[tokens])) W_head^T      W_head: the embedding with tie_embeddings

Training, prefill and decoding are the same call; the state of the mixers is all that a prefix
leaves behind. The embedding starts as N(0, embedding_std^2), other parameters as N(0, 0.02^2) where
the mixer's paper says nothing else. Logits are float32, also under a bfloat16 compute dtype:
products of compute-dtype numbers, summed in float32."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network, token_embedding
from models.parts.options import Count, Factor
from models.parts.projections import NORMAL


class LM(Backbone):
    """Tokens to logits of the next token; see `build` for the options."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        tie_embeddings: bool = False,
        embedding_std: Factor = 0.02,
        vocabulary_rows: Count = 0,
        teacher: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        if 0 < vocabulary_rows < vocabulary:
            raise ValueError(
                f"vocabulary_rows must be 0 or at least the {vocabulary} tokens of the task; got"
                f" {vocabulary_rows}"
            )
        vocabulary = vocabulary_rows or vocabulary
        super().__init__(
            token_embedding(
                vocabulary, width, std=embedding_std, rngs=rngs, param_dtype=param_dtype
            ),
            width=width,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            **backbone,
        )
        if tie_embeddings:
            self.head_WD = None
        else:
            head_WD = NORMAL(rngs.params(), (vocabulary, width), param_dtype)
            self.head_WD = nnx.Param(head_WD, out_sharding=("vocabulary", "embed"))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.teacher = (
            build(teacher, vocabulary=vocabulary, rngs=rngs, **dtypes) if teacher else None
        )

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
        x_BTD, state = self.hidden(tokens_BT, state, positions=positions, segment_ids=segment_ids)
        if readout_positions is not None:
            x_BTD = jnp.take_along_axis(x_BTD, readout_positions[:, :, None], axis=1)
        x_BTD = self.norm(x_BTD).astype(self.compute_dtype)
        head = self.embedding.embedding if self.head_WD is None else self.head_WD
        head_WD = head[...].astype(self.compute_dtype)
        return (
            jnp.einsum("btd,wd->btw", x_BTD, head_WD, preferred_element_type=jnp.float32),
            state,
        )

    @property
    def causal(self) -> bool:
        """Whether logits depend on no later token, so that the model has a state and can decode."""
        return self.stack.causal

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token of `batch` sequences; ValueError if a mixer has none."""
        return self.stack.init_state(batch)


def build(
    model_config: Mapping[str, Any],
    *,
    vocabulary: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> LM:
    """The model of a config's `model` section (without its name), with the options of
    models/blocks/backbone.py and

    tie_embeddings    the head is the embedding
    embedding_std     standard deviation of the embedding's first values
    vocabulary_rows   rows of embedding and head, where a checkpoint has more than the task has
                      tokens; 0: as many
    teacher           the section of a second model, without its name, whose distribution this one
                      learns in the place of targets (experiments/objectives/next_token.py)

    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    return build_network(
        LM,
        "lm",
        model_config,
        vocabulary=vocabulary,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
