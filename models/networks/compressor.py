"""An autoencoder over a pattern of mixers: all tokens of a sequence are read back from the stack's
output at the last one.

The compression task of MAD (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures",
ICML 2024, arXiv 2403.17844):

    h = norm(stack(embedding[tokens])_T)            the last position alone
    logits_t = gelu((h + p_t) W_1 + b_1) W_2 + b_2
    p_t                                             sinusoidal position embedding, arXiv 1706.03762

What the mixers carry to the last token is all that the decoder has.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network, token_embedding
from models.parts.options import Factor
from models.parts.projections import projection


class Compressor(Backbone):
    """Tokens [B, T] to logits [B, T, W] of the same tokens; see `build` for the options."""

    causal = False  # every logit depends on the last token

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        embedding_std: Factor = 0.02,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        super().__init__(
            token_embedding(
                vocabulary, width, std=embedding_std, rngs=rngs, param_dtype=param_dtype
            ),
            width=width,
            rngs=rngs,
            **dtypes,
            **backbone,
        )
        init = nnx.initializers.lecun_normal()
        self.decoder = projection(
            width, width, ("embed", "mlp"), init=init, bias=True, rngs=rngs, **dtypes
        )
        self.head = projection(
            width, vocabulary, ("mlp", None), init=init, bias=True, rngs=rngs, **dtypes
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Logits float32 of all tokens, and no state: decoding needs the whole sequence."""
        x_BTD, _ = self.hidden(tokens_BT, positions=positions, segment_ids=segment_ids)
        h_BD = self.norm(x_BTD[:, -1])
        places_TD = sinusoids(tokens_BT.shape[1], h_BD.shape[-1])
        h_BTD = (h_BD[:, None, :] + places_TD[None]).astype(self.compute_dtype)
        logits_BTW = self.head(jax.nn.gelu(self.decoder(h_BTD)))
        return logits_BTW.astype(jnp.float32), None


def sinusoids(length: int, width: int) -> jax.Array:
    """[T, D]: sines in the even channels, cosines in the odd ones, wavelengths 2 pi to 20000 pi."""
    channel_D = jnp.arange(width)
    frequency_D = 10_000.0 ** (-(channel_D // 2 * 2) / width)
    angle_TD = jnp.arange(length)[:, None] * frequency_D[None, :]
    return jnp.where(channel_D[None, :] % 2 == 0, jnp.sin(angle_TD), jnp.cos(angle_TD))


def build(
    model_config: Mapping[str, Any],
    *,
    vocabulary: int,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> Compressor:
    """The model of a config's `model` section (without its name), with the options of
    models/blocks/backbone.py and `embedding_std`, as in models/networks/lm.py.

    `tie_embeddings`, which only a language model has, must be off. Raises ValueError for unknown,
    missing or impossible options, with what is possible."""
    options = dict(model_config)
    if options.pop("tie_embeddings", False):
        raise ValueError("model compressor has no tie_embeddings; set it to False")
    return build_network(
        Compressor,
        "compressor",
        options,
        vocabulary=vocabulary,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
