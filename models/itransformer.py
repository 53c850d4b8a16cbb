"""iTransformer. Liu, Hu, Zhang, Wu, Wang, Ma, Long, "iTransformer: Inverted Transformers Are
Effective for Time Series Forecasting", ICLR 2024, arXiv 2310.06625.

    o_t = sum_s drop(softmax_s(q_t k_s / sqrt(K))) v_s,    y = drop(o W_o + b_o)

    q, k, v     q_BTHK ...      x W + b, in heads
    t, s        tokens; in the paper variates of a series, in models/networks/forecaster: there are
                no positions and no mask
    drop        dropout

The paper's block around it, a = LN(E + y), E' = LN(a + drop(W_2 drop(gelu(W_1 a)))), is that of the
backbone with pre_norm=False, mlp="gelu", mlp_width and mlp_dropout.

State: none, every token reads all others. Cost per token: O(T D).

Departures: none known. Maps start as U(+-fan_in^-1/2), biases likewise, as in the authors' code.

Authors' code: https://github.com/thuml/iTransformer
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Probability, Size
from models.parts.projections import (
    FAN_IN_UNIFORM,
    fan_in_bias,
    head_size,
    merge_heads,
    projection,
    split_heads,
)
from ops.framework.segments import numbers


class FullAttention(nnx.Module):
    """x_BTD -> y_BTD; there is no state. Tokens of a segment read each other and no others."""

    causal = False

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 8,
        dropout: Probability = 0.1,
    ):
        head_size(width, heads)
        dense = functools.partial(
            projection,
            width,
            width,
            init=FAN_IN_UNIFORM,
            bias=True,
            bias_init=fan_in_bias(width),
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads = heads
        self.query, self.key, self.value = (dense(("embed", "heads")) for _ in range(3))
        self.output = dense(("heads", "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        q_BTHK, k_BTHK, v_BTHK = (
            split_heads(dense(x_BTD), self.heads) for dense in (self.query, self.key, self.value)
        )
        scores_BHTT = jnp.einsum(
            "bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32
        ) / math.sqrt(q_BTHK.shape[-1])
        if segment_ids is not None:
            number_BT = numbers(segment_ids)
            same_BTT = number_BT[:, :, None] == number_BT[:, None, :]
            scores_BHTT = jnp.where(same_BTT[:, None], scores_BHTT, -jnp.inf)
        p_BHTT = self.dropped(jax.nn.softmax(scores_BHTT)).astype(v_BTHK.dtype)
        o_BTHK = jnp.einsum("bhts,bshk->bthk", p_BHTT, v_BTHK)
        return self.dropped(self.output(merge_heads(o_BTHK))), None

    def dropped(self, x: jax.Array) -> jax.Array:
        return x if self.dropout is None else self.dropout(x)


Mixer = FullAttention
