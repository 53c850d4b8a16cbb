"""LiT. Wang et al., "LiT: Delving into a Simple(d) Linear Diffusion Transformer for Image
Generation", ICCV 2025: linear attention for a diffusion Transformer, made of one with softmax
attention (`experiments/configs/lit.py`).

    q = relu(x W_q + b_q) + 1e-6,   k = relu(x W_k + b_k) + 1e-6,   v = x W_v + b_v
    o_i = q_i (sum_j k_j^T v_j) / N / (q_i mean_j k_j + 1e-6)
    y = (o + depthwise 5 x 5 convolution of v + b_c) W_o + b_o

    q, k, v    q_BTHK, k_BTHK, v_BTHK    K = width / H
    filters    weight_YXK, bias_K        shared by all heads

Few heads: the products of a token cost width^2 / H, and two heads made better images than six. Not
causal, so there is no state; cost per token: O(H K^2). The convolution sees the grid of tokens, or
a line where there is none. N is the number of tokens, also where segments keep them apart, and then
weighs 1e-6 alone. feature_map="gelu" is of the paper's ablation, kernel_size=0 leaves the
convolution out.

First values of maps are Xavier-uniform, as DiT's. The numbers 1e-6 and the bias b_c are of the
first author's later code; the paper's was not to be had.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.grid_convolution import KernelSize, convolved_heads, head_filters
from models.parts.options import Size, check_choice
from models.parts.projections import XAVIER, head_size, merge_heads, projection, split_heads
from ops.bidirectional_linear_attention.api import bidirectional_linear_attention

EPS = 1e-6
FEATURES: dict[str, Any] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class LiT(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False
    reads_input = ("query", "key", "value")

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 2,
        kernel_size: KernelSize = 5,
        feature_map: str = "relu",
    ):
        check_choice("feature_map", feature_map, tuple(FEATURES))
        dense = functools.partial(
            projection,
            bias=True,
            init=XAVIER,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads, self.feature_map, self.compute_dtype = heads, feature_map, compute_dtype
        size = head_size(width, heads)
        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.output = dense(width, width, ("heads", "embed"))
        filters = head_filters(kernel_size, size, rngs=rngs, param_dtype=param_dtype)
        self.weight_YXK, self.bias_K = filters

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, None]:
        q_BTD, k_BTD, v_BTD = (dense(x_BTD) for dense in (self.query, self.key, self.value))
        feature = FEATURES[self.feature_map]
        q_BTHK, k_BTHK = (
            split_heads(feature(a.astype(jnp.float32)) + EPS, self.heads) for a in (q_BTD, k_BTD)
        )
        o_BTHK = bidirectional_linear_attention(
            q_BTHK,
            k_BTHK / x_BTD.shape[1],
            split_heads(v_BTD, self.heads).astype(jnp.float32),
            eps=EPS,
            segment_ids=segment_ids,
        )
        o_BTD = merge_heads(o_BTHK)
        if self.weight_YXK is not None and self.bias_K is not None:
            o_BTD += convolved_heads(v_BTD, self.weight_YXK, self.bias_K, grid, segment_ids)
        return self.output(o_BTD.astype(self.compute_dtype)), None


Mixer = LiT
