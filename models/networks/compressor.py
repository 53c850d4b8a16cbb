"""An autoencoder over a pattern of mixers: all tokens of a sequence read back from the last state
of the stack.

The compression task of MAD (Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures",
ICML 2024, arXiv 2403.17844):

    h = norm(stack(embedding[tokens])_T)            the last position alone
    logits_t = gelu((h + p_t) W_1 + b_1) W_2 + b_2   p_t: sinusoidal position embedding (arXiv
    1706.03762)

What the mixers carry to the last token is all that the decoder has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.networks.stack import Stack
from models.parts.norms import rms_norm
from models.parts.options import check_options
from models.parts.projections import projection


class Compressor(nnx.Module):
    """Tokens [B, T] to logits [B, T, W] of the same tokens; see `build` for the options."""

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
        embedding_std: float = 0.02,
        scan_layers: bool = True,
        remat: str = "none",
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
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
            **dtypes,
        )
        self.norm = rms_norm(width, eps=norm_eps, axis="embed", rngs=rngs, param_dtype=param_dtype)
        init = nnx.initializers.lecun_normal()
        self.decoder = projection(
            width, width, ("embed", "mlp"), init=init, bias=True, rngs=rngs, **dtypes
        )
        self.head = projection(
            width, vocabulary_size, ("mlp", None), init=init, bias=True, rngs=rngs, **dtypes
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Logits float32 of all tokens, and no state: decoding needs the whole sequence."""
        x_BTD, _ = self.stack(
            self.embedding(tokens_BT), None, positions=positions, segment_ids=segment_ids
        )
        h_BD = self.norm(x_BTD[:, -1])
        places_TD = sinusoids(tokens_BT.shape[1], h_BD.shape[-1])
        h_BTD = (h_BD[:, None, :] + places_TD[None]).astype(self.compute_dtype)
        logits_BTW = self.head(jax.nn.gelu(self.decoder(h_BTD)))
        return logits_BTW.astype(jnp.float32), None


def sinusoids(length: int, width: int) -> jax.Array:
    """[T, D]: sines in the even channels, cosines in the odd ones, wavelengths 2 pi to 20,000
    pi."""
    channel_D = jnp.arange(width)
    frequency_D = 10_000.0 ** (-(channel_D // 2 * 2) / width)
    angle_TD = jnp.arange(length)[:, None] * frequency_D[None, :]
    return jnp.where(channel_D[None, :] % 2 == 0, jnp.sin(angle_TD), jnp.cos(angle_TD))


def build(
    model_config: Mapping[str, Any],
    *,
    vocabulary_size: int,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Compressor:
    """The model of a config's `model` section (without its name), with the options of
    models/networks/lm.py.

    The entries that only a language model has, tie_embeddings and embedding_dropout, must be off.
    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    options = {"mixers": {}, **model_config}
    for name in ("tie_embeddings", "embedding_dropout"):
        if options.pop(name, False):
            raise ValueError(f"model compressor has no {name}; set it to 0 or False")
    check_options(
        "model compressor",
        "model",
        options,
        Compressor,
        supplied=("vocabulary_size", "param_dtype", "compute_dtype", "rngs"),
    )
    dtypes: dict[str, Any] = {
        "param_dtype": jnp.dtype(param_dtype),
        "compute_dtype": jnp.dtype(compute_dtype),
    }
    return Compressor(vocabulary_size=vocabulary_size, rngs=rngs, **dtypes, **options)
