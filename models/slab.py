"""SLAB. Guo, Chen, Tang, Wang, "SLAB: Efficient Transformers with Simplified Linear Attention and
Progressive Re-parameterized Batch Normalization", ICML 2024, arXiv 2405.11582. The attention; the
norm is `model.norm="progressive_batch"` (models/parts/batch_norm.py), which after training folds
into the maps behind it (models/blocks/folding.py).

    q = relu(x W_q + b_q),   k = relu(x W_k + b_k + e),   v = x W_v + b_v
    o_i = q_i (sum_j k_j^T v_j) / (q_i sum_j k_j + 1e-6)
    y = (o + depthwise 5 x 5 convolution of v + b_c) W_o + b_o

    q, k, v    q_BTHK, k_BTHK, v_BTHK    K = width / H
    e          position_PD               a learned row for each token of a grid, 0 at first
    filters    weight_YXK, bias_K        shared by all heads

The cheaper of (q k^T) v and q (k^T v) is taken by the sizes. Not causal, so there is no state; cost
per token: O(H K^2) or O(T H K). Segments stay apart; without a grid the tokens are a line.

position_grid=() leaves e out, kernel_size=0 the convolution.

Departures: e is resized (bicubic) for a grid of another size, where the authors' models have one
resolution; first values are N(0, 0.02^2), W_o's less by sqrt(2 depth).

Authors' code: https://github.com/xinghaochen/SLAB
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.grid_convolution import KernelSize, convolved_heads, head_filters
from models.parts.options import Size
from models.parts.positions import resized_table
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.bidirectional_linear_attention.api import bidirectional_linear_attention


class SimplifiedLinearAttention(nnx.Module):
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
        heads: Size = 4,
        kernel_size: KernelSize = 5,
        position_grid: tuple[Size, ...] = (),
    ):
        if len(position_grid) not in (0, 2):
            raise ValueError(f"position_grid must be () or (rows, columns); got {position_grid!r}")
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.position_grid = heads, tuple(position_grid)
        self.compute_dtype = compute_dtype
        size = head_size(width, heads)
        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.output = dense(width, width, ("heads", "embed"), init=residual_normal(depth))

        def position() -> nnx.Param:
            rows, columns = position_grid
            table_PD = jnp.zeros((rows * columns, width), param_dtype)
            return nnx.Param(table_PD, out_sharding=(None, "heads"), group="no_decay")

        self.position_PD = position() if position_grid else None
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
        if self.position_PD is not None:
            if grid is None:
                raise ValueError("slab with position_grid needs a grid of tokens; got a line")
            e_TD = resized_table(self.position_PD[...], self.position_grid, grid)
            k_BTD = k_BTD + e_TD[None].astype(k_BTD.dtype)
        q_BTHK, k_BTHK, v_BTHK = (split_heads(a, self.heads) for a in (q_BTD, k_BTD, v_BTD))
        o_BTHK = bidirectional_linear_attention(
            jax.nn.relu(q_BTHK),
            jax.nn.relu(k_BTHK),
            v_BTHK.astype(jnp.float32),
            eps=1e-6,
            segment_ids=segment_ids,
        )
        o_BTD = merge_heads(o_BTHK)
        if self.weight_YXK is not None and self.bias_K is not None:
            o_BTD += convolved_heads(v_BTD, self.weight_YXK, self.bias_K, grid, segment_ids)
        return self.output(o_BTD.astype(self.compute_dtype)), None


Mixer = SimplifiedLinearAttention
