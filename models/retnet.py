"""RetNet. Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei, "Retentive Network: A Successor to Transformer
for Large Language Models", 2023, arXiv 2307.08621.

    S_t = gamma_h S_{t-1} + k_t^T v_t,    o_t = q_t S_t / sqrt(K)                       (Eq. 6)
    q_t = rotate(x_t W_q, t),    k_t = rotate(x_t W_k, t),    v_t = x_t W_v             (Eq. 5)
    gamma_h = 1 - 2^(-5 - h),    h = 0 .. H - 1                                         (Eq. 8)
    y_t = (swish(x_t W_g) * norm(o_t)) W_o,    norm per head                            (Eq. 8)

    q, k        q_BTHK, k_BTHK      heads * K = d; pairs of channels turned by t 10000^(-2i/K)
    v           v_BTHV              heads * V = expand_v d = 2 d
    log gamma   decay_log_H         constant
    S           "memory" [B,H,K,V]  float32; holds rotated keys

State: 2 d^2 / H floats and the position. Cost per token: O(d^2/H). The mixer has 8 d^2
parameters: the paper pairs it with an MLP of 4 d^2 (mlp_ratio 2).

Departures: the norm is the released code's RMSNorm without a learned scale, where the paper writes
GroupNorm; `norm_scale` adds one for all heads alike, as some checkpoints have it. The scaling
of scores in the released code, which this norm cancels, is left out. Angles are those of RoPE; the
released code spaces the same range slightly differently. Initialisation as there: Xavier-uniform,
gain 2^-2.5, and gain 1 for W_o.

Authors' code: https://github.com/microsoft/torchscale
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import simple_rms_norm
from models.parts.options import Epsilon, Factor, Size
from models.parts.positions import next_position, token_positions
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.rotary import RopeBase, check_pairs, rotate
from ops.gated_linear_attention.api import gated_linear_attention


def decay_log(heads: int) -> jax.Array:
    """log gamma [H] (Eq. 8)."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))))


class Retention(nnx.Module):
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
        expand_v: Factor = 2.0,
        rope_base: RopeBase = 10000.0,
        norm_eps: Epsilon = 1e-5,
        norm_scale: bool = False,
    ):
        dense = functools.partial(
            projection,
            init=XAVIER_SMALL,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads, self.rope_base, self.norm_eps, self.compute_dtype = (
            heads,
            rope_base,
            norm_eps,
            compute_dtype,
        )
        self.key_size = check_pairs(head_size(width, heads))
        self.value_size = head_size(width, heads, expand_v)
        value_width = heads * self.value_size

        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.output_gate = dense(width, value_width, ("embed", "heads"))
        scale_V = jnp.ones((self.value_size,), param_dtype)
        self.scale_V = nnx.Param(scale_V, out_sharding=(None,)) if norm_scale else None
        self.output = dense(
            value_width, width, ("heads", "embed"), init=nnx.initializers.xavier_uniform()
        )

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
        # Eq. 5
        q_BTHK = rotate(
            split_heads(self.query(x_BTD), self.heads), positions_BT, base=self.rope_base
        )
        k_BTHK = rotate(split_heads(self.key(x_BTD), self.heads), positions_BT, base=self.rope_base)
        # Eq. 6
        o_BTHV, memory = gated_linear_attention(
            q_BTHK,
            k_BTHK,
            split_heads(self.value(x_BTD), self.heads),
            decay_log(self.heads),
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        # Eq. 8
        o_BTHV = simple_rms_norm(o_BTHV, self.norm_eps)
        if self.scale_V is not None:
            o_BTHV = o_BTHV * self.scale_V[...].astype(jnp.float32)[None, None, None, :]
        o_BTD = merge_heads(o_BTHV).astype(self.compute_dtype)
        y_BTD = self.output(jax.nn.silu(self.output_gate(x_BTD)) * o_BTD)
        return y_BTD, {"memory": memory, "position": next_position(positions_BT, reverse=reverse)}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = Retention
