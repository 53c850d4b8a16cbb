"""NormAttention, the upper half of TransNormer. Qin, Han, Sun, Li, Kong, Barnes, Zhong, "The Devil
in Linear Transformer", EMNLP 2022, arXiv 2210.10340. The lower half is `diag_attention`.

    o_t = norm(sum_{s <= t} (q_t k_s) v_s),    norm(x) = x / sqrt(mean(x^2) + eps) over all heads
    q_t = phi(x_t W_q) turned by t theta,    k_s = phi(x_s W_k) turned by s theta
    phi(x) = elu(x) + 1 of feature_map="elu_plus_one" (T2), elu(x) of "elu" (T1)
    y_t = o_t W_o

With causal=False the sum is over all s: o = norm(Q (K^T V)).

    q, k    q_BTHK, k_BTHK      heads * K = d
    v       v_BTHV              heads * V = d
    theta   rotation.theta_K    [K/2], learned, starts at 10000^(-2i/K)
    sum     "memory" [B,H,K,V]  float32; sum of k_s^T v_s

The norm takes the place of linear attention's denominator, through which gradients are unbounded.

State: d^2 / H floats and the position; none with causal=False. Cost per token: O(d^2/H). The base
model has 12 layers, 12 heads and width 768: six layers of DiagAttention, then six of this.

T2 is the paper's choice for autoregressive models, T1 for bidirectional ones. The projections of q,
k and v start Xavier-uniform with gain 2^-0.5, as in the paper; W_o as N(0, 0.02^2 / (2 depth)).

Authors' code: https://github.com/OpenNLPLab/Transnormer
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state
from models.parts.norms import simple_rms_norm
from models.parts.options import Epsilon, Size, check_choice
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
from ops.bidirectional_linear_attention.api import bidirectional_linear_attention
from ops.gated_linear_attention.api import gated_linear_attention


class NormAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V] float32, "position" [B] int32}, None with
    causal=False.

    "position" is where the next token stands when `positions` is not given.
    """

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
        feature_map: str = "elu_plus_one",
        causal: bool = True,
    ):
        check_choice("feature_map", feature_map, ("elu_plus_one", "elu"))
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.norm_eps, self.compute_dtype = heads, norm_eps, compute_dtype
        self.head_size, self.causal = head_size(width, heads), causal
        self.shift = 1 if feature_map == "elu_plus_one" else 0

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
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        batch, length, _ = x_BTD.shape
        state = state or self._first_state(batch)
        positions_BT = token_positions(
            positions, state["position"], length, segment_ids, reverse=reverse
        )
        q_BTHK, k_BTHK = (
            self.rotation(
                jax.nn.elu(split_heads(dense(x_BTD), self.heads)) + self.shift, positions_BT
            )
            for dense in (self.query, self.key)
        )
        v_BTHV = split_heads(self.value(x_BTD), self.heads)
        if self.causal:
            o_BTHV, memory = gated_linear_attention(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                scale=1.0,
                initial_state=state["memory"],
                segment_ids=segment_ids,
                reverse=reverse,
            )
            position = next_position(positions_BT, reverse=reverse)
            after = {"memory": memory, "position": position}
        else:
            o_BTHV, after = (
                bidirectional_linear_attention(
                    q_BTHK, k_BTHK, v_BTHV, normalise=False, segment_ids=segment_ids
                ),
                None,
            )
        o_BTD = simple_rms_norm(merge_heads(o_BTHV), self.norm_eps)
        return self.output(o_BTD.astype(self.compute_dtype)), after

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. ValueError with causal=False."""
        if not self.causal:
            raise no_state("transnormer")
        return self._first_state(batch)

    def _first_state(self, batch: int) -> dict[str, Any]:
        memory = jnp.zeros((batch, self.heads, self.head_size, self.head_size), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = NormAttention
