"""Hedgehog. Zhang, Bhatia, Kumbong, Re, "The Hedgehog & the Porcupine: Expressive Linear Attentions
with Softmax Mimicry", ICLR 2024, arXiv 2402.04347.

    o_t = sum_{s <= t} a_ts v_s,   a_ts = phi_q(q_t) phi_k(k_s) / sum_{r <= t} phi_q(q_t) phi_k(k_r)
    phi(x) = softmax([y, -y])  or  exp([y, -y]),    y = tau (x W_phi + b)
    y_t = o_t W_o

    q, k        q_BTHK, k_BTHK          x W_q, x W_k, rotated (rope)
    v           v_BTHV
    W_phi, b    weight_HKK, bias_HK     one map per head for queries, one for keys; start as I and 0
    tau         temperature
    numerator,  "memory" [B,H,2K,V+1]   float32; the last column sums the key features
    denominator

The map has one layer, so that it can be fitted to the weights of softmax attention; trained from
scratch it learns with everything else. Over 2K features the softmax keeps each feature in (0, 1);
the one of the queries cancels in a_ts, the one of the keys does not. feature_map="exp" is the
paper's unnormalised map and overflows where |y| passes 88. The scores depend on each position by
itself, not on differences: positions must start at 0 in every document.

State: 2 d (V + 1) floats and the position. Cost per token: O(2 d V).

Departures: none known for a layer trained from scratch; the paper's loss that fits the map to a
softmax layer belongs to converting a trained model and is not part of the mixer. Initialisation:
N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: the feature map in https://github.com/HazyResearch/lolcats
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.normalised_attention import normalised_attention
from models.parts.options import Factor, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import RopeBase, check_pairs, rotate

DENOMINATOR_EPS = 1e-10


class SoftmaxMimicry(nnx.Module):
    """phi: [B, T, H, K] -> [B, T, H, 2K], positive, float32."""

    def __init__(
        self, heads: int, head_size: int, *, kind: str, temperature: float, param_dtype: DTypeLike
    ):
        check_choice("feature_map", kind, ("softmax", "exp"))
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
        both_BTHK = self.temperature * jnp.concatenate((y_BTHK, -y_BTHK), axis=-1)
        return jax.nn.softmax(both_BTHK, axis=-1) if self.kind == "softmax" else jnp.exp(both_BTHK)


class Hedgehog(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,2K,V+1] float32, "position" [B] int32}.

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
    ):
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
        if rope:
            check_pairs(self.head_size)

        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
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
        q_BTHK, k_BTHK = (
            split_heads(self.query(x_BTD), self.heads),
            split_heads(self.key(x_BTD), self.heads),
        )
        if self.rope:
            q_BTHK = rotate(q_BTHK, positions_BT, base=self.rope_base)
            k_BTHK = rotate(k_BTHK, positions_BT, base=self.rope_base)
        o_BTHV, memory = normalised_attention(
            self.query_map(q_BTHK),
            self.key_map(k_BTHK),
            split_heads(self.value(x_BTD), self.heads),
            eps=DENOMINATOR_EPS,
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTD = self.output(merge_heads(o_BTHV.astype(self.compute_dtype)))
        return y_BTD, {"memory": memory, "position": next_position(positions_BT, reverse=reverse)}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.heads, 2 * self.head_size, self.head_size + 1), jnp.float32)
        return {"memory": memory, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = Hedgehog
