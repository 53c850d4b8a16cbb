"""Hedgehog. Zhang, Bhatia, Kumbong, Re, "The Hedgehog & the Porcupine: Expressive Linear Attentions
with Softmax Mimicry", ICLR 2024, arXiv 2402.04347.

    o_t = sum_{s <= t} a_ts v_s,   a_ts = phi_q(q_t) phi_k(k_s) / sum_{r <= t} phi_q(q_t) phi_k(k_r)
    phi(x) = softmax([y, -y])  or  exp([y, -y]),    y = tau (x W_phi + b)
    y_t = o_t W_o

    q, k        q_BTHK, k_BTHK          x W_q, x W_k, rotated (rope)
    v           v_BTHV
    W_phi, b    weight_HKK, bias_HK     one map per head for queries, one for keys; start as I and 0
    tau         temperature
    numerator,  "memory" [B,H,F',V+1]   float32; the last column sums the key features
    denominator

The map has one layer, so that it can be fitted to the weights of softmax attention; trained from
scratch it learns with everything else. Over 2K features the softmax keeps each feature in (0, 1);
the one of the queries cancels in a_ts, the one of the keys does not. feature_map="exp" is the
paper's unnormalised map and overflows where |y| passes 88; "relu", T2R's relu(y), and "elu",
1 + elu(y), are what it is compared with, of K features. The scores depend on each position by
itself, not on differences: positions must start at 0 in every document.

stage="transfer" fits the maps to a trained softmax layer (experiments/configs/hedgehog.py): the
layer gives on what softmax attention over `context_length` tokens gives, and reports as its loss
the cross-entropy -sum_s p_ts log a_ts of the softmax weights p, a mean over t and heads; no
gradient reaches q, k, v. It reports besides: transfer_error, the divergence of a from p; the
entropies of both; and monotonicity, of the keys of a last token sorted by q k the share of
neighbours at which a rises. The weights are T x T: train at T up to about 1024.

State: F' (V + 1) floats per head, F' = 2K or K, and the position; the first stage has the keys and
values of softmax attention beside it. Cost per token: O(F' d).

Departures: none known. Initialisation: N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: the feature map in https://github.com/HazyResearch/lolcats
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.normalised_attention import normalised_attention
from models.parts.options import Count, Factor, Reach, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import RopeBase, check_pairs, rotate
from models.parts.variables import AUXILIARY_LOSS, TRANSFER_ERROR, report
from ops.window_attention.api import init_window_state, pad_window_state, window_attention

DENOMINATOR_EPS = 1e-10
MAPS = ("softmax", "exp", "relu", "elu")
STAGES = ("transfer", "student")


class SoftmaxMimicry(nnx.Module):
    """phi: [B, T, H, K] -> [B, T, H, F'], positive, float32."""

    def __init__(
        self, heads: int, head_size: int, *, kind: str, temperature: float, param_dtype: DTypeLike
    ):
        check_choice("feature_map", kind, MAPS)
        self.kind, self.temperature = kind, temperature
        weight_HKK = jnp.broadcast_to(
            jnp.eye(head_size, dtype=param_dtype)[None], (heads, head_size, head_size)
        )
        self.weight_HKK = nnx.Param(weight_HKK, out_sharding=("heads", None, None))
        bias_HK = jnp.zeros((heads, head_size), param_dtype)
        self.bias_HK = nnx.Param(bias_HK, group="no_decay", out_sharding=("heads", None))

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        weight_HKK, bias_HK = (
            self.weight_HKK[...].astype(jnp.float32),
            self.bias_HK[...].astype(jnp.float32),
        )
        y_BTHK = (
            jnp.einsum("bthk,hkj->bthj", x_BTHK.astype(jnp.float32), weight_HKK)
            + bias_HK[None, None]
        )
        if self.kind in ("relu", "elu"):
            y_BTHK = self.temperature * y_BTHK
            return jax.nn.relu(y_BTHK) if self.kind == "relu" else jax.nn.elu(y_BTHK) + 1
        both_BTHK = self.temperature * jnp.concatenate((y_BTHK, -y_BTHK), axis=-1)
        return jax.nn.softmax(both_BTHK, axis=-1) if self.kind == "softmax" else jnp.exp(both_BTHK)


class Hedgehog(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,F',V+1] float32, "position" [B] int32}, and
    "teacher", the `WindowState` of softmax attention, in the stage "transfer".

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
        feature_map: str = "softmax",
        temperature: Factor = 1.0,
        rope: bool = True,
        rope_base: RopeBase = 10000.0,
        key_value_heads: Count = 0,
        stage: str = "student",
        context_length: Reach = 1024,
    ):
        check_choice("stage", stage, STAGES)
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.rope, self.rope_base, self.compute_dtype = (
            heads,
            rope,
            rope_base,
            compute_dtype,
        )
        self.head_size = head_size(width, heads)
        self.key_value_heads = key_value_heads or heads  # 0: as many
        if heads % self.key_value_heads:
            raise ValueError(f"key_value_heads must divide heads={heads}; got {key_value_heads}")
        self.transfers, self.context_length = stage == "transfer", context_length
        self.features = self.head_size * (1 if feature_map in ("relu", "elu") else 2)
        if rope:
            check_pairs(self.head_size)

        self.query = dense(width, width, ("embed", "heads"))
        key_width = self.key_value_heads * self.head_size
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, key_width, ("embed", "heads"))
        phi = functools.partial(
            SoftmaxMimicry,
            heads,
            self.head_size,
            kind=feature_map,
            temperature=temperature,
            param_dtype=param_dtype,
        )
        self.query_map, self.key_map = phi(), phi()
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
        q_BTHK = split_heads(self.query(x_BTD), self.heads)
        k_BTHK, v_BTHV = (
            split_heads(x, self.key_value_heads) for x in (self.key(x_BTD), self.value(x_BTD))
        )
        if self.rope:
            q_BTHK = rotate(q_BTHK, positions_BT, base=self.rope_base)
            k_BTHK = rotate(k_BTHK, positions_BT, base=self.rope_base)
        if self.transfers:
            if reverse:
                raise ValueError("hedgehog with stage='transfer' learns from causal attention")
            return self.transfer(q_BTHK, k_BTHK, v_BTHV, state, positions_BT, segment_ids)
        o_BTHV, memory = normalised_attention(
            self.query_map(q_BTHK),
            self.key_map(self.per_query_head(k_BTHK)),
            self.per_query_head(v_BTHV),
            eps=DENOMINATOR_EPS,
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTD = self.output(merge_heads(o_BTHV.astype(self.compute_dtype)))
        return y_BTD, {"memory": memory, "position": next_position(positions_BT, reverse=reverse)}

    def per_query_head(self, x_BTHK: jax.Array) -> jax.Array:
        """Keys or values of grouped heads, one for each head of queries."""
        return jnp.repeat(x_BTHK, self.heads // self.key_value_heads, axis=2)

    def transfer(
        self,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        state: dict[str, Any],
        positions_BT: jax.Array,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """y of softmax attention, and what there is to report of the weights of both."""
        q_BTHK, k_BTHK, v_BTHV = jax.lax.stop_gradient(
            (q_BTHK.astype(self.compute_dtype), k_BTHK.astype(self.compute_dtype), v_BTHV)
        )
        o_BTHV, teacher = window_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            window=self.context_length,
            initial_state=state["teacher"],
            segment_ids=segment_ids,
        )
        keys_BTHK = self.per_query_head(k_BTHK)
        report(self, **self.compared(q_BTHK, keys_BTHK, segment_ids))
        return self.output(merge_heads(o_BTHV)), {
            "memory": state["memory"],
            "position": next_position(positions_BT),
            "teacher": pad_window_state(teacher, self.context_length),
        }

    def compared(
        self, q_BTHK: jax.Array, k_BTHK: jax.Array, segment_ids: jax.Array | None
    ) -> dict[str, jax.Array]:
        """The weights of the maps beside those of softmax, in numbers."""
        length = q_BTHK.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        q, k = (x.astype(jnp.float32) for x in (q_BTHK, k_BTHK))
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * self.head_size**-0.5
        p_log = jax.nn.log_softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        weights = jnp.einsum("bthf,bshf->bhts", self.query_map(q_BTHK), self.key_map(k_BTHK))
        # A choice on the way in: log 0 has no gradient.
        a_log = jnp.log(jnp.where(seen, weights, 1.0) + DENOMINATOR_EPS)
        a_log = a_log - jax.nn.logsumexp(jnp.where(seen, a_log, -jnp.inf), axis=-1, keepdims=True)

        def mean(by: jax.Array, of: jax.Array) -> jax.Array:
            """-sum_s exp(by) of, a mean over t and heads."""
            return -jnp.mean(jnp.sum(jnp.where(seen, jnp.exp(by) * of, 0.0), axis=-1))

        p_log = jnp.where(seen, p_log, 0.0)
        cross, entropy = mean(p_log, a_log), mean(p_log, p_log)
        order = jnp.argsort(jnp.where(seen, scores, -jnp.inf)[:, :, -1], axis=-1)
        rising = jnp.diff(jnp.take_along_axis(a_log[:, :, -1], order, axis=-1), axis=-1) > 0
        shown = jnp.broadcast_to(seen[:, :, -1], order.shape)
        both = jnp.take_along_axis(shown, order, axis=-1)[..., :-1]
        return {
            AUXILIARY_LOSS: cross,
            TRANSFER_ERROR: cross - entropy,
            "softmax_entropy": entropy,
            "entropy": mean(a_log, a_log),
            "monotonicity": jnp.sum(rising & both) / jnp.maximum(jnp.sum(both), 1),
        }

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        size = self.head_size
        memory = jnp.zeros((batch, self.heads, self.features, size + 1), jnp.float32)
        found: dict[str, Any] = {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}
        if self.transfers:
            found["teacher"] = init_window_state(
                batch, self.context_length, self.key_value_heads, size, size, self.compute_dtype
            )
        return found


Mixer = Hedgehog
