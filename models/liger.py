"""Liger: a gated recurrence and a window out of the weights of softmax attention. Lan, Sun, Hu,
Deng, Cheng, "Liger: Linearizing Large Language Models to Gated Recurrent Structures", ICML 2025,
arXiv 2503.01496.

    q, k, v = x W_q, x W_k, x W_v        of the attention that it replaces; no new parameter
    S_t = Diag(alpha_t) S_{t-1} + phi(k_t)^T v_t,    o^R_t = softmax(q_t) S_t
    o^W_t = sum_{t - window < s <= t} softmax_s(rotate(q_t) rotate(k_s) / sqrt(K)) v_s
    y_t = (a o^R_t + (1 - a) o^W_t) W_o

    gate="gla"      log alpha = logsigmoid(k) / 16,    phi(k) = softmax(k)
    gate="hgrn2"    log alpha = logsigmoid(k),         phi(k) = 1 - sigmoid(k)
    gate="none"     log alpha = 0,                     phi(k) = softmax(k)
    gate="gsa"      log alpha = logsigmoid(p) / 16,    and slots K~_t, V~_t in place of S_t:
                    K~_t = Diag(alpha_t) K~_{t-1} + (1 - alpha_t)^T k_t,  V~_t with v_t likewise,
                    o^R_t = softmax(q_t K~_t^T) V~_t

    q, k, v     q_BTHK, k_BTHK, v_BTHV      before the rotation, which the window alone has; keys
                                            and values of grouped heads are repeated
    p           gate_BTHM                   keys pooled to `slots` channels per head (0: K), means
                                            of neighbours; with K channels, as the others have, k
    log alpha   decay_log_BTHK              float32
    a           recurrence_share            0.5, not learned
    S           "memory" [B,H,K,V]          float32; with slots V~ [B,H,M,V], and K~ is "slot_keys"
                                            [B,H M,K,1]

The mixer has the parameters of models/transformer.py, by the same names: a run that starts from one
with softmax attention finds all of them (experiments/configs/liger.py).

State: H K V floats, with slots H M (K + V), and the window. Cost per token: O(H K V + window d).

Departures: the window counts the current token. With slots each slot's keys are a head with a decay
of its own, which costs more than one decay per key channel does. gate_projection=True takes the k
of alpha from a map of its own, which starts at random: an ablation of the paper.

Authors' code: https://github.com/OpenSparseLLMs/Linearization"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Count, Epsilon, Range, Reach, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import merge_heads, projection, split_heads
from models.parts.rotary import RopeBase
from models.window_attention import WindowAttention
from ops.gated_linear_attention.api import gated_linear_attention
from ops.window_attention.api import pad_window_state, window_attention

GATES = ("gla", "hgrn2", "none", "gsa")
TEMPERATURE = 16.0


class Liger(WindowAttention):
    """x_BTD -> y_BTD; the state is that of `WindowAttention` and "memory" [B,H,K,V] float32."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        window: Reach = 64,
        gate: str = "gla",
        slots: Count = 0,
        gate_projection: bool = False,
        recurrence_share: Annotated[float, Range(0, 1)] = 0.5,
        heads: Size = 4,
        key_value_heads: Count = 0,
        rope: bool = True,
        rope_base: RopeBase = 10000.0,
        qk_norm: bool = False,
        norm_eps: Epsilon = 1e-5,
        size_per_head: Count = 0,
        rope_scaling: tuple[Any, ...] = (),
        qkv_bias: bool = False,
        output_bias: bool = False,
        rotary_size: Count = 0,
        output_gate: bool = False,
        zero_centred_norm: bool = False,
        whole_norm: bool = False,
    ):
        check_choice("gate", gate, GATES)
        self.gate_kind, self.recurrence_share = gate, recurrence_share
        super().__init__(
            width,
            depth=depth,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            window=window,
            heads=heads,
            key_value_heads=key_value_heads,
            rope=rope,
            rope_base=rope_base,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            size_per_head=size_per_head,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            rotary_size=rotary_size,
            output_gate=output_gate,
            zero_centred_norm=zero_centred_norm,
            whole_norm=whole_norm,
        )
        if slots and gate != "gsa":
            raise ValueError(f"slots is for gate='gsa'; got slots={slots} and gate={gate!r}")
        self.slots = slots or self.head_size
        if self.slots > self.head_size:
            raise ValueError(f"slots must be at most the {self.head_size} of a head; got {slots}")
        self.gate_map = (
            projection(
                width,
                self.key_value_heads * self.head_size,
                ("embed", "heads"),
                rngs=rngs,
                param_dtype=param_dtype,
                compute_dtype=compute_dtype,
            )
            if gate_projection
            else None
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        batch, length, _ = x_BTD.shape
        state = state or self.init_state(batch)
        positions_BT = token_positions(positions, state["position"], length, segment_ids)
        q_BTHK, k_BTHK, v_BTHV = self.projected(x_BTD)
        o_BTHV, window = window_attention(
            self.rotated(q_BTHK, positions_BT).astype(self.compute_dtype),
            self.rotated(k_BTHK, positions_BT).astype(self.compute_dtype),
            v_BTHV,
            window=self.window,
            initial_state=state["window"],
            segment_ids=segment_ids,
        )
        gate_BTHK = k_BTHK
        if self.gate_map is not None:
            gate_BTHK = split_heads(self.gate_map(x_BTD), self.key_value_heads)
        recurrent_BTHV, memory = self.recurrence(
            q_BTHK, k_BTHK, v_BTHV, gate_BTHK, state, segment_ids
        )
        share = self.recurrence_share
        o_BTHV = share * recurrent_BTHV + (1 - share) * o_BTHV.astype(jnp.float32)
        y_BTD = self.projected_out(merge_heads(o_BTHV).astype(self.compute_dtype), x_BTD)
        return y_BTD, {
            "window": pad_window_state(window, self.window),
            "position": next_position(positions_BT),
            **memory,
        }

    def recurrence(
        self,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        gate_BTHK: jax.Array,
        state: dict[str, Any],
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """o^R, float32, and the memory after the last token."""
        gate_BTHM = pooled(gate_BTHK.astype(jnp.float32), self.slots)
        q_BTHK, k_BTHK, v_BTHV = (x.astype(jnp.float32) for x in (q_BTHK, k_BTHK, v_BTHV))
        k_BTHK, v_BTHV, gate_BTHM = (self.per_query_head(x) for x in (k_BTHK, v_BTHV, gate_BTHM))
        apart: dict[str, Any] = {"scale": 1.0, "segment_ids": segment_ids}
        decay_log, phi_BTHK = None, jax.nn.softmax(k_BTHK, axis=-1)
        if self.gate_kind in ("gla", "gsa"):
            decay_log = jax.nn.log_sigmoid(gate_BTHM) / TEMPERATURE
        elif self.gate_kind == "hgrn2":
            decay_log, phi_BTHK = jax.nn.log_sigmoid(gate_BTHM), jax.nn.sigmoid(-gate_BTHM)
        after = {}
        if self.gate_kind == "gsa":
            assert decay_log is not None
            phi_BTHK = -jnp.expm1(decay_log)  # what a slot takes in
            batch, length = q_BTHK.shape[:2]
            # Every slot is a head, and those of one head have its queries and keys.
            score, after["slot_keys"] = gated_linear_attention(
                q_BTHK,
                k_BTHK,
                phi_BTHK.reshape(batch, length, -1, 1),
                decay_log.reshape(batch, length, -1),
                initial_state=state["slot_keys"],
                **apart,
            )
            q_BTHK = score.reshape(batch, length, self.heads, -1)
        o_BTHV, after["memory"] = gated_linear_attention(
            jax.nn.softmax(q_BTHK, axis=-1),
            phi_BTHK,
            v_BTHV,
            decay_log,
            initial_state=state["memory"],
            **apart,
        )
        return o_BTHV, after

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: an empty window at position 0, and zeros."""
        memory = jnp.zeros((batch, self.heads, self.slots, self.head_size), jnp.float32)
        found = {**super().init_state(batch), "memory": memory}
        if self.gate_kind == "gsa":
            shape = (batch, self.heads * self.slots, self.head_size, 1)
            found["slot_keys"] = jnp.zeros(shape, jnp.float32)
        return found


def pooled(x_BTHK: jax.Array, size: int) -> jax.Array:
    """[B, T, H, size]: of all channels of all heads, one after another, means of neighbours.

    Mean i of P is over those from floor(i L / P) to ceil((i + 1) L / P) of L channels."""
    heads, channels = x_BTHK.shape[2:]
    if size == channels:
        return x_BTHK
    inputs, outputs = heads * channels, heads * size
    mean_LP = np.zeros((inputs, outputs), np.float32)
    for i in range(outputs):
        first, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        mean_LP[first:end, i] = 1 / (end - first)
    flat_BTL = x_BTHK.reshape(*x_BTHK.shape[:2], -1)
    return split_heads(flat_BTL @ mean_LP, heads)


Mixer = Liger
