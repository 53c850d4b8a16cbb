"""Multi-head latent attention: keys and values out of one small vector per token. DeepSeek-AI,
"DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024, arXiv
2405.04434.

    c_t = norm(x_t W_c)                                              the latent          (Eq. 9)
    k_s = [c_s W_k, p_s],   v_s = c_s W_v,   p_s = rotate(x_s W_p)   per head, one p    (Eq. 10-15)
    q_t = [u_t, rotate(r_t)] = x_t W_q,  or  norm(x_t W_a) W_q with query_latent_size   (Eq. 12-14)
    o_t = sum_{s <= t} softmax_s(q_t k_s / sqrt(K + P)) v_s,   y_t = o_t W_o            (Eq. 18)

    u, r        q_BTHK        the first key_size channels, and the last shared_key_size
    c, p        key_BT1K      latent_size and shared_key_size channels, the same for all heads
    W_k, W_v    key_up_LHK, value_up_LHV
    T           context_length      tokens that a query sees at most, itself included

It is computed with u_t W_k^T in the place of u_t, and the values of all heads read from one c: that
is attention of many query heads to one key head, whose keys are [c, p] and whose values are c.

State: 2 latent_size + shared_key_size numbers of each of the last context_length - 1 tokens, of the
compute dtype. Cost per token: O(T heads (latent_size + shared_key_size)).

Departures: c is in the state twice, as part of a key and as a value. Kimi Linear (arXiv 2510.26692)
has no rotation (`rope`). Channels are rotated in halves. Initialisation: N(0, 0.02^2); W_o divided
by sqrt(2 depth).

Authors' code: https://github.com/deepseek-ai/DeepSeek-V2
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import rms_norm
from models.parts.options import Count, Epsilon, Reach, Size
from models.parts.positions import next_position, token_positions
from models.parts.projections import NORMAL, merge_heads, projection, residual_normal, split_heads
from models.parts.rotary import RopeBase, rotate
from ops.window_attention.api import init_window_state, pad_window_state, window_attention


class LatentAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"window": WindowState, "position" [B] int32}.

    "window" holds [c, p] as keys and c as values."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        context_length: Reach,
        heads: Size = 4,
        latent_size: Size = 64,
        key_size: Size = 32,
        shared_key_size: Size = 16,
        value_size: Size = 32,
        query_latent_size: Count = 0,
        rope: bool = True,
        rope_base: RopeBase = 10000.0,
        norm_eps: Epsilon = 1e-6,
    ):
        if rope and shared_key_size % 2:
            raise ValueError(f"shared_key_size must be even with rope=True; got {shared_key_size}")
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        norm = functools.partial(rms_norm, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.heads, self.window, self.compute_dtype = heads, context_length, compute_dtype
        self.latent_size, self.shared_key_size = latent_size, shared_key_size
        self.key_size, self.rope, self.rope_base = key_size, rope, rope_base

        self.query_in = (
            dense(width, query_latent_size, ("embed", None)) if query_latent_size else None
        )
        self.query_norm = norm(query_latent_size) if query_latent_size else None
        self.query = dense(
            query_latent_size or width,
            heads * (key_size + shared_key_size),
            (None if query_latent_size else "embed", "heads"),
        )
        self.latent = dense(width, latent_size, ("embed", None))
        self.shared_key = dense(width, shared_key_size, ("embed", None))
        self.latent_norm = norm(latent_size)
        self.key_up_LHK, self.value_up_LHV = (
            nnx.Param(
                NORMAL(rngs.params(), (latent_size, heads, size), param_dtype),
                out_sharding=(None, "heads", None),
            )
            for size in (key_size, value_size)
        )
        self.output = dense(
            heads * value_size, width, ("heads", "embed"), init=residual_normal(depth)
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
        h_BTD = x_BTD
        if self.query_in is not None and self.query_norm is not None:
            h_BTD = self.query_norm(self.query_in(x_BTD)).astype(self.compute_dtype)
        u_BTHK, r_BTHP = jnp.split(
            split_heads(self.query(h_BTD), self.heads), [self.key_size], axis=-1
        )
        c_BT1L = self.latent_norm(self.latent(x_BTD)).astype(self.compute_dtype)[:, :, None]
        p_BT1P = self.shared_key(x_BTD)[:, :, None]
        if self.rope:
            r_BTHP, p_BT1P = (
                rotate(x, positions_BT, base=self.rope_base).astype(self.compute_dtype)
                for x in (r_BTHP, p_BT1P)
            )
        key_up_LHK, value_up_LHV = (
            up[...].astype(self.compute_dtype) for up in (self.key_up_LHK, self.value_up_LHV)
        )
        q_BTHL = jnp.einsum("bthk,lhk->bthl", u_BTHK, key_up_LHK)
        o_BTHL, window = window_attention(
            jnp.concatenate((q_BTHL, r_BTHP), axis=-1),
            jnp.concatenate((c_BT1L, p_BT1P), axis=-1),
            c_BT1L,
            window=self.window,
            scale=(self.key_size + self.shared_key_size) ** -0.5,
            initial_state=state["window"],
            segment_ids=segment_ids,
        )
        o_BTHV = jnp.einsum("bthl,lhv->bthv", o_BTHL, value_up_LHV)
        return self.output(merge_heads(o_BTHV)), {
            "window": pad_window_state(window, self.window),
            "position": next_position(positions_BT),
        }

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: an empty window at position 0."""
        keys = self.latent_size + self.shared_key_size
        window = init_window_state(
            batch, self.window, 1, keys, self.latent_size, self.compute_dtype
        )
        return {"window": window, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = LatentAttention
