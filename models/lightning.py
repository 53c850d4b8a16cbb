"""Lightning Attention and its language model TNL. Qin, Sun, Li, Shen, Sun, Zhong, "Various Lengths,
Constant Speed: Efficient Language Modeling with Lightning Attention", ICML 2024, arXiv 2405.17381;
Lightning Attention-2, 2024, arXiv 2401.04658; Lightning Attention 1 and TransNormerLLM, 2023, arXiv
2307.14995.

    S_t = lambda S_{t-1} + k_t^T v_t,    o_t = q_t S_t
    q = swish(x W_q),    k = swish(x W_k),    v = x W_v,    u = x W_u
    y_t = (norm(o_t) * u_t) W_o,    norm(x) = x / sqrt(mean(x^2) + eps) over all heads together
    first layer (LRPE-d): q_t, k_t turned by t theta

    q, k        q_BTHK, k_BTHK      heads * K = d
    v           v_BTHV              K = V
    log lambda  decay_log_H         constant per layer l of L and head h of H, see `decay_log`
    theta       rotation.theta_K    [K/2], learned, starts at 10000^(-2i/K)
    S           "memory" [B,H,K,V]  float32

decay: "paper", lambda = exp(-(8h/H) (1 - l/L)), head 0 never forgets; "alibi", the released models,
slopes of ALiBi; "minimax", those of MiniMax-Text-01 (2025, arXiv 2501.08313), 2^(-8 (h + 1) / H)
for any H; "receptive", the authors' later choice, one over receptive lengths spaced evenly in log
from 2 to 256.

Lightning Attention 1 (quadratic in time) and 2 (linear, a state between blocks) are one function;
the op's chunked form has the block structure of 2.

State: d^2 / H floats and the position; heads have 128 channels in the paper. Cost per token:
O(d^2/H).

Departures: the block around the mixer is the common one (norm with a learned scale, SwiGLU), where
TNL has neither a scale nor an activation; the paper's ablations see no difference. `gate_rank` > 0
is the gate of the released models, u = sigmoid((x W_1) W_2), of rank K there. MiniMax-Text-01 has a
size of heads of its own (`size_per_head`), swish on v (`value_silu`), a norm with a learned scale
(`norm_scale`) and u = sigmoid(x W_u) (`sigmoid_gate`). theta and the turn exist in every layer,
which is what layers of one program cost; the angles are 0 where the paper has none. Initialisation:
N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/OpenNLPLab/lightning-attention,
https://github.com/OpenNLPLab/TransnormerLLM
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import rms_norm, simple_rms_norm
from models.parts.options import Count, Epsilon, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import LearnedRotation
from models.parts.variables import LayerConstant
from ops.gated_linear_attention.api import gated_linear_attention

DECAYS = ("paper", "alibi", "minimax", "receptive")


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8h/H) for h = 1 .. H, a power of two.

    For another H, the slopes of the power P below it, then every other one of those of 2 P."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    below = 1 << (heads.bit_length() - 1)
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: heads - below]


def decay_log(kind: str, heads: int, layer: jax.Array | int, depth: int) -> jax.Array:
    """log lambda [H] of layer 0 <= `layer` < `depth`: -slope_h times a factor falling with it."""
    if kind == "paper":
        slopes, factor = [8 * h / heads for h in range(heads)], 1 - layer / depth
    elif kind == "minimax":
        slopes = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
        factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5
    elif kind == "alibi":
        slopes, factor = alibi_slopes(heads), 1 - layer / max(depth - 1, 1) + 1e-5
    else:
        exponents = [1 + 7 * h / max(heads - 1, 1) for h in range(heads)]
        slopes, factor = (
            [2**-exponent for exponent in exponents],
            1 - layer / max(depth - 1, 1) + 1e-5,
        )
    return -jnp.asarray(slopes, jnp.float32) * jnp.asarray(factor, jnp.float32)


class LightningAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V] float32, "position" [B] int32}.

    "position" is where the next token stands when `positions` is not given.
    """

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        layer: jax.Array | int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        decay: str = "paper",
        lrpe: str = "first",
        gate_rank: Count = 0,
        norm_eps: Epsilon = 1e-6,
        size_per_head: Count = 0,
        value_silu: bool = False,
        norm_scale: bool = False,
        sigmoid_gate: bool = False,
    ):
        check_choice("decay", decay, DECAYS)
        check_choice("lrpe", lrpe, ("none", "first", "all"))
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.norm_eps, self.compute_dtype = heads, norm_eps, compute_dtype
        self.head_size = size_per_head or head_size(width, heads)
        self.value_silu, self.sigmoid_gate = value_silu, sigmoid_gate or gate_rank > 0
        inner = heads * self.head_size

        self.query = dense(width, inner, ("embed", "heads"))
        self.key = dense(width, inner, ("embed", "heads"))
        self.value = dense(width, inner, ("embed", "heads"))
        self.gate_in = dense(width, gate_rank, ("embed", None)) if gate_rank else None
        self.gate = dense(gate_rank or width, inner, (None if gate_rank else "embed", "heads"))
        self.norm = (
            rms_norm(inner, eps=norm_eps, axis="heads", rngs=rngs, param_dtype=param_dtype)
            if norm_scale
            else None
        )
        self.output = dense(inner, width, ("heads", "embed"), init=residual_normal(depth))
        self.decay_log_H = LayerConstant(decay_log(decay, heads, layer, depth))
        sized_by = "size_per_head" if size_per_head else "heads"
        self.rotation = None if lrpe == "none" else LearnedRotation(self.head_size, sized_by)
        self.turns = LayerConstant(
            jnp.asarray((lrpe == "all") | (jnp.asarray(layer) == 0), jnp.float32)
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
        q_BTHK = split_heads(jax.nn.silu(self.query(x_BTD)), self.heads)
        k_BTHK = split_heads(jax.nn.silu(self.key(x_BTD)), self.heads)
        if self.rotation is not None:
            turned_BT = self.turns[...] * positions_BT.astype(jnp.float32)
            q_BTHK, k_BTHK = (self.rotation(q_BTHK, turned_BT), self.rotation(k_BTHK, turned_BT))
        v_BTD = self.value(x_BTD)
        o_BTHV, memory = gated_linear_attention(
            q_BTHK,
            k_BTHK,
            split_heads(jax.nn.silu(v_BTD) if self.value_silu else v_BTD, self.heads),
            self.decay_log_H[...],
            scale=1.0,
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        u_BTD = self.gate(x_BTD if self.gate_in is None else self.gate_in(x_BTD))
        if self.sigmoid_gate:
            u_BTD = jax.nn.sigmoid(u_BTD)
        o_BTD = merge_heads(o_BTHV)
        o_BTD = simple_rms_norm(o_BTD, self.norm_eps) if self.norm is None else self.norm(o_BTD)
        return self.output(o_BTD.astype(self.compute_dtype) * u_BTD), {
            "memory": memory,
            "position": next_position(positions_BT, reverse=reverse),
        }

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.heads, self.head_size, self.head_size), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = LightningAttention
