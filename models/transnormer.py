"""NormAttention, the upper half of TransNormer. Qin, Han, Sun, Li, Kong, Barnes, Zhong, "The Devil
in Linear Transformer", EMNLP 2022, arXiv 2210.10340. The lower half is `diag_attention`.

    o_t = norm(sum_{s <= t} (q_t k_s) v_s),    norm(x) = x / sqrt(mean(x^2) + eps) over all heads
    q_t = phi(x_t W_q) turned by t theta,    k_s = phi(x_s W_k) turned by s theta
    phi(x) = elu(x) + 1
    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK      heads * K = d
    v       v_BTHV              heads * V = d
    theta   rotation.theta_K    [K/2], learned, starts at 10000^(-2i/K)
    sum     "memory" [B,H,K,V]  float32; sum of k_s^T v_s

The norm takes the place of linear attention's denominator, through which gradients are unbounded.

State: d^2 / H floats and the position. Cost per token: O(d^2/H). The base model has 12 layers, 12
heads and width 768: six layers of DiagAttention, then six of this.

Departures: this is T2, the paper's choice for autoregressive models; T1, for bidirectional ones, is
left out. The paper starts the projections of q, k and v Xavier-uniform with gain 2^-0.5; W_o starts
as N(0, 0.02^2 / (2 depth)).

Authors' code: https://github.com/OpenNLPLab/Transnormer
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import simple_rms_norm
from models.parts.options import Epsilon, Size
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    XAVIER_MEDIUM,
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import LearnedRotation
from ops.gated_linear_attention.api import gated_linear_attention


class NormAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V] float32, "position" [B] int32}.

    "position" is where the next token stands when `positions` is not given.
    """

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        norm_eps: Epsilon = 1e-6,
    ):
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.norm_eps, self.compute_dtype = heads, norm_eps, compute_dtype
        self.head_size = head_size(width, heads)

        self.query = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.key = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.value = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.rotation = LearnedRotation(self.head_size)
        self.output = dense(width, width, ("heads", "embed"), init=residual_normal(depth))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        batch, length, _ = x_BTD.shape
        state = state or self.init_state(batch)
        positions_BT = token_positions(
            positions, state["position"], length, segment_ids, reverse=reverse
        )
        q_BTHK = jax.nn.elu(split_heads(self.query(x_BTD), self.heads)) + 1
        k_BTHK = jax.nn.elu(split_heads(self.key(x_BTD), self.heads)) + 1
        o_BTHV, memory = gated_linear_attention(
            self.rotation(q_BTHK, positions_BT),
            self.rotation(k_BTHK, positions_BT),
            split_heads(self.value(x_BTD), self.heads),
            scale=1.0,
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTD = self.output(
            simple_rms_norm(merge_heads(o_BTHV), self.norm_eps).astype(self.compute_dtype)
        )
        return y_BTD, {"memory": memory, "position": next_position(positions_BT, reverse=reverse)}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.heads, self.head_size, self.head_size), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = NormAttention
