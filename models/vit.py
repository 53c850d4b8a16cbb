"""Vision Transformer. Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
Recognition at Scale", ICLR 2021, arXiv 2010.11929; with the biases of DeiT (Touvron et al., ICML
2021, arXiv 2012.12877). The softmax baseline of the image models.

    o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s            over all tokens s of the document
    y = o W_o + b_o

    q, k, v    q_BTHK, k_BTHK, v_BTHV    x W + b

Not causal, so there is no state; cost per token: O(T H K). It sees no order: positions are added to
the tokens before the first block.

Departures: first values are N(0, 0.02^2), W_o's less by sqrt(2 depth); with init="xavier" they are
Xavier-uniform, as DiT has them (Peebles and Xie, ICCV 2023, arXiv 2212.09748).

Authors' code: https://github.com/google-research/vision_transformer
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Size, check_choice
from models.parts.projections import (
    NORMAL,
    XAVIER,
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.shifted_window_attention.api import shifted_window_attention


class SoftmaxAttention(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False
    reads_input = ("query", "key", "value")  # the maps of x, into which a norm before it folds

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        init: str = "normal",
    ):
        check_choice("init", init, ("normal", "xavier"))
        head_size(width, heads)  # that they divide
        first, last = (NORMAL, residual_normal(depth)) if init == "normal" else (XAVIER, XAVIER)
        dense = functools.partial(
            projection,
            bias=True,
            init=first,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads = heads
        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.output = dense(width, width, ("heads", "embed"), init=last)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        return self.output(self.attended(x_BTD, segment_ids=segment_ids)), None

    def attended(self, x_BTD: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """o_BTD, what W_o reads."""
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(dense(x_BTD), self.heads) for dense in (self.query, self.key, self.value)
        )
        whole: Any = (x_BTD.shape[1],)
        o_BTHV = shifted_window_attention(
            q_BTHK, k_BTHK, v_BTHV, grid=whole, window=whole, segment_ids=segment_ids
        )
        return merge_heads(o_BTHV)


Mixer = SoftmaxAttention
