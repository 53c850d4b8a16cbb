"""A classifier of sequences over a pattern of mixers: encoder, blocks, norm, pooling, head.

    logits = pool(norm(stack(encoder(tokens)))) W + b                           one document
    logits = relu([a, b, a b, a - b] W_1 + b_1) W_2 + b_2                       two documents

a and b are two documents that the same weights have read apart, each pooled: Retrieval of the Long
Range Arena (Tay et al., ICLR 2021, arXiv 2011.04006) and of S5 (arXiv 2208.04933).

    encoder     "embedding": a row of a table for each of the `vocabulary` tokens
                "linear": ((v - mean) / std) W + b of the numbers of a token, such as a grey level
    pool        the mean over the tokens of the document, or its first or last; padding, of which a
                mask tells, is not read, by no mixer, norm or pool"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.blocks.backbone import Backbone, build_network, token_embedding
from models.blocks.batch_norm import masked_norm
from models.parts.options import FLOAT32_LARGEST, Count, Factor, Range, Size, check_choice
from models.parts.projections import FAN_IN_UNIFORM, projection

POOLINGS = ("mean", "first", "last")
Number = Annotated[float, Range(-FLOAT32_LARGEST, FLOAT32_LARGEST)]
Spread = Annotated[float, Range(0, FLOAT32_LARGEST, ("low",))]


class NumberEncoder(nnx.Module):
    """Numbers [B, T], or [B, T, channels], int or float, to x_BTD, float32."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        mean: float,
        std: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ):
        self.mean, self.std, self.channels = mean, std, channels
        self.linear = projection(
            channels,
            width,
            (None, "embed"),
            init=FAN_IN_UNIFORM,
            bias=True,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=jnp.float32,
        )

    def __call__(self, values: jax.Array) -> jax.Array:
        values_BTC = values[..., None] if values.ndim == 2 else values
        if values_BTC.ndim != 3 or values_BTC.shape[2] != self.channels:
            raise ValueError(
                f"numbers must be [B, T, {self.channels}] as the model was made for; got"
                f" {values.shape}"
            )
        return self.linear((values_BTC.astype(jnp.float32) - self.mean) / self.std)


class SequenceClassifier(Backbone):
    """Sequences to logits of their classes; see `build` for the options."""

    causal = False

    def __init__(
        self,
        *,
        classes: int,
        vocabulary: int,
        channels: int,
        documents: int,
        width: Size,
        encoder: str = "embedding",
        embedding_std: Factor = 1.0,
        input_mean: Number = 0.0,
        input_std: Spread = 1.0,
        pooling: str = "mean",
        head_width: Count = 0,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        **backbone: Any,
    ):
        check_choice("encoder", encoder, ("embedding", "linear"))
        check_choice("pooling", pooling, POOLINGS)
        if documents not in (1, 2):
            raise ValueError(f"a classifier reads 1 document or compares 2; got {documents}")
        if encoder == "embedding" and not vocabulary:
            raise ValueError(
                "encoder='embedding' needs a task with a vocabulary; 'linear' reads numbers"
            )
        given: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        super().__init__(
            token_embedding(vocabulary, width, std=embedding_std, **given)
            if encoder == "embedding"
            else NumberEncoder(channels or 1, width, mean=input_mean, std=input_std, **given),
            width=width,
            compute_dtype=compute_dtype,
            **given,
            **backbone,
        )
        self.documents, self.pooling = documents, pooling
        inner = (head_width or width) if documents == 2 else width

        def dense(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> nnx.Linear:
            init = nnx.initializers.lecun_normal()
            return projection(
                inputs, outputs, axes, init=init, bias=True, compute_dtype=jnp.float32, **given
            )

        self.comparison = dense(4 * width, inner, ("embed", "mlp")) if documents == 2 else None
        self.head = dense(inner, classes, ("mlp" if documents == 2 else "embed", None))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, classes], float32.

        tokens: [B, T], or numbers [B, T, channels]; of two documents the first and the second half
        of T, each with padding of its own. mask bool [B, T]: the tokens that there are; padding is
        at the ends of a document. segment_ids int [B, T]: the documents of a row, which are then
        packed in any way: 0 for the first, 1 for the second, and anything else is not read."""
        if segment_ids is None:
            tokens = self.apart(tokens)
            mask, positions = (None if x is None else self.apart(x) for x in (mask, positions))
            of_document = None if mask is None else mask[:, None]
        else:
            number_N = jnp.arange(self.documents)
            of_document = segment_ids[:, None] == number_N[None, :, None]
            if mask is not None:
                of_document &= mask[:, None]
            mask = jnp.any(of_document, axis=1)
        x_BTD, _ = self.hidden(tokens, mask=mask, positions=positions, segment_ids=segment_ids)
        x_BTD = masked_norm(self.norm, x_BTD, mask)
        if of_document is None:
            of_document = jnp.ones((len(x_BTD), 1, x_BTD.shape[1]), bool)
        pooled_BND = pooled(x_BTD, of_document, self.pooling)
        pooled_BND = pooled_BND.reshape(-1, self.documents, x_BTD.shape[-1])
        if self.comparison is None:
            return self.head(pooled_BND[:, 0])
        a_BD, b_BD = pooled_BND[:, 0], pooled_BND[:, 1]
        both_BD = jnp.concatenate([a_BD, b_BD, a_BD * b_BD, a_BD - b_BD], axis=-1)
        return self.head(jax.nn.relu(self.comparison(both_BD)))

    def apart(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] with each of the documents, which divide T evenly, as a row of its own."""
        if x.shape[1] % self.documents:
            raise ValueError(
                f"tokens of {self.documents} documents must divide evenly; got {x.shape[1]}"
            )
        return x.reshape(len(x) * self.documents, -1, *x.shape[2:])


def pooled(x_BTD: jax.Array, of_document_BNT: jax.Array, pooling: str) -> jax.Array:
    """What a head reads of each of N documents, [B, N, D]; zeros of one that has no token."""
    if pooling == "mean":
        count_BN1 = jnp.sum(of_document_BNT, axis=-1, dtype=jnp.float32)[..., None]
        # A choice, not a product with zero: padding may hold anything.
        kept = jnp.where(of_document_BNT[..., None], x_BTD[:, None], 0.0)
        return jnp.sum(kept, axis=2) / jnp.maximum(count_BN1, 1.0)
    place_T = jnp.arange(x_BTD.shape[1])
    place_BNT = jnp.where(of_document_BNT, place_T[None, None], -1)
    place_BN = jnp.argmax(of_document_BNT, axis=-1)
    if pooling == "last":
        place_BN = jnp.argmax(place_BNT, axis=-1)
    x_BND = jnp.take_along_axis(x_BTD, place_BN[..., None], axis=1)
    return jnp.where(jnp.any(of_document_BNT, axis=-1)[..., None], x_BND, 0.0)


def build(
    model_config: Mapping[str, Any],
    *,
    classes: int,
    vocabulary: int = 0,
    channels: int = 0,
    documents: int = 1,
    rngs: nnx.Rngs,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
) -> SequenceClassifier:
    """The model of a config's `model` section (without its name), with the options of
    models/blocks/backbone.py and

    encoder                  "embedding" of tokens, or "linear" of numbers
    embedding_std            standard deviation of the table's first values
    input_mean, input_std    of the numbers that "linear" reads, in their own unit
    pooling                  "mean", "first" or "last"
    head_width               inner width of the head that compares two documents; 0: the width

    Raises ValueError for unknown, missing or impossible options, with what is possible."""
    return build_network(
        SequenceClassifier,
        "sequence_classifier",
        model_config,
        classes=classes,
        vocabulary=vocabulary,
        channels=channels,
        documents=documents,
        rngs=rngs,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
    )
