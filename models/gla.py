"""GLA, gated linear attention. Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention Transformers
with Hardware-Efficient Training", ICML 2024, arXiv 2312.06635.

    S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t,    o_t = q_t S_t                          (Section 4.1)
    alpha_t = sigmoid((x_t W_1) W_2 + b)^(1/tau)                                       (Section 4.4)
    y_t = (swish(x_t W_r) * norm(o_t)) W_o,     norm per head                          (Section 4.4)

    q, k        q_BTHK, k_BTHK      x W_q / sqrt(K), x W_k; d_k = expand_k d = d/2 over H heads
    v           v_BTHV              x W_v; d_v = expand_v d = d over H heads
    log alpha   decay_log_BTHK      float32; W_1 [d, gate_rank], W_2 [gate_rank, d_k];
                                    tau = gate_temperature = 16
    S           "memory" [B,H,K,V]  float32

State: d_k d_v / H floats. Cost per token: O(d_k d_v / H).

Departures, both as in the authors' released code: RMSNorm instead of LayerNorm on each head's
output, and no bias on W_r. `conv_width` > 0 adds a causal depthwise convolution and SiLU on q, k, v
(the "GLA with convolution" of later papers). Initialisation: Xavier-uniform with gain 2^-2.5, b =
0, so that alpha starts near 0.5^(1/16) = 0.958.

Authors' code: https://github.com/berlino/gated_linear_attention,
https://github.com/fla-org/flash-linear-attention
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.convolved_projections import ConvolvedProjections
from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Factor, Size
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from ops.gated_linear_attention.api import gated_linear_attention


class GatedLinearAttention(ConvolvedProjections):
    """x_BTD -> y_BTD; the state is {"conv_q", "conv_k", "conv_v", "memory" [B,H,K,V]}, float32."""

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
        expand_k: Factor = 0.5,
        expand_v: Factor = 1.0,
        gate_rank: Size = 16,
        gate_temperature: Factor = 16.0,
        conv_width: ConvWidth = 0,
        norm_eps: Epsilon = 1e-5,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.gate_temperature, self.compute_dtype = (
            heads,
            gate_temperature,
            compute_dtype,
        )
        self.key_size = head_size(width, heads, expand_k)
        self.value_size = head_size(width, heads, expand_v)
        key_width, value_width = heads * self.key_size, heads * self.value_size

        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.add_convolutions(key_width, value_width, conv_width, rngs=rngs, **dtypes)
        self.gate_in = dense(width, gate_rank, ("embed", None))
        self.gate_out = dense(gate_rank, key_width, (None, "heads"), bias=True)
        self.norm = rms_norm(self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.output_gate = dense(width, value_width, ("embed", "heads"))
        self.output = dense(value_width, width, ("heads", "embed"))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        state = state or {}
        q_BTD, k_BTD, v_BTD, convolutions = self.convolved(
            x_BTD, state, segment_ids, reverse=reverse
        )
        if self.conv_q.width:
            q_BTD, k_BTD, v_BTD = (jax.nn.silu(q_BTD), jax.nn.silu(k_BTD), jax.nn.silu(v_BTD))
        # Section 4.4
        logit_BTD = self.gate_out(self.gate_in(x_BTD)).astype(jnp.float32)
        decay_log_BTD = jax.nn.log_sigmoid(logit_BTD) / self.gate_temperature
        # Section 4.1
        o_BTHV, memory = gated_linear_attention(
            split_heads(q_BTD, self.heads),
            split_heads(k_BTD, self.heads),
            split_heads(v_BTD, self.heads),
            split_heads(decay_log_BTD, self.heads),
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        o_BTD = merge_heads(self.norm(o_BTHV)).astype(self.compute_dtype)
        y_BTD = self.output(jax.nn.silu(self.output_gate(x_BTD)) * o_BTD)
        return y_BTD, {**convolutions, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            **self.init_convolutions(batch),
            "memory": jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32),
        }


Mixer = GatedLinearAttention
