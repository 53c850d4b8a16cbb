"""LinFusion. Liu, Yu, Tan, Wang, "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024, arXiv 2409.02097:
linear attention that takes the place of softmax attention in a diffusion model, with weights that
add up to 1 and no causal order, so that larger images are read as the small ones were
(`experiments/configs/linfusion.py`).

    F(x) = leaky_relu(LayerNorm(x W_1 + b_1)) W_2 + b_2              one for q, one for k
    q = elu((x + F_q(x)) W_q + b_q) + 1,   k = elu((x + F_k(x)) W_k + b_k) + 1,   v = x W_v + b_v
    o_i = q_i (sum_j k_j^T v_j) / N / (q_i mean_j k_j + 1e-4),   y = o W_o + b_o

    q, k, v    q_BTHK, k_BTHK, v_BTHK    K = width / H

Not causal, so there is no state; cost per token: O(width^2). N is the number of tokens, also where
segments keep them apart, and then weighs 1e-4 alone.

Departures: W_q, W_k and W_v have biases, as have those of DiT, which they continue; first values of
them and of W_o are Xavier-uniform, as DiT's.

Authors' code: https://github.com/Huage001/LinFusion
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import layer_norm
from models.parts.options import Size
from models.parts.projections import (
    FAN_IN_UNIFORM,
    XAVIER,
    fan_in_bias,
    head_size,
    merge_heads,
    projection,
    split_heads,
)
from ops.bidirectional_linear_attention.api import bidirectional_linear_attention

EPS = 1e-4
SLOPE = 0.01  # of leaky_relu


class FeatureMap(nnx.Module):
    """x + F(x), [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, **common: Any):
        dense = functools.partial(
            projection, width, width, init=FAN_IN_UNIFORM, bias=True, bias_init=fan_in_bias(width)
        )
        self.first = dense(("embed", "mlp"), **common)
        norms = {"rngs": common["rngs"], "param_dtype": common["param_dtype"]}
        self.norm = layer_norm(width, eps=1e-5, axis="mlp", **norms)
        self.second = dense(("mlp", "embed"), **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTM = jax.nn.leaky_relu(self.norm(self.first(x_BTD)), SLOPE)
        return x_BTD + self.second(h_BTM.astype(x_BTD.dtype))


class LinFusion(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
    ):
        del depth
        head_size(width, heads)  # that they divide
        common: Any = {"rngs": rngs, "param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, width, width, init=XAVIER, bias=True, **common)
        self.heads, self.compute_dtype = heads, compute_dtype
        self.query = dense(("embed", "heads"))
        self.key = dense(("embed", "heads"))
        self.value = dense(("embed", "heads"))
        self.output = dense(("heads", "embed"))
        self.query_map = FeatureMap(width, **common)
        self.key_map = FeatureMap(width, **common)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        q_BTD, k_BTD = self.query(self.query_map(x_BTD)), self.key(self.key_map(x_BTD))
        q_BTHK, k_BTHK = (
            split_heads(jax.nn.elu(a.astype(jnp.float32)) + 1, self.heads) for a in (q_BTD, k_BTD)
        )
        o_BTHK = bidirectional_linear_attention(
            q_BTHK,
            k_BTHK / x_BTD.shape[1],
            split_heads(self.value(x_BTD), self.heads).astype(jnp.float32),
            eps=EPS,
            segment_ids=segment_ids,
        )
        return self.output(merge_heads(o_BTHK).astype(self.compute_dtype)), None


Mixer = LinFusion
