"""LoLCATs: softmax in a window and linear attention before it, under one denominator. Zhang, Arora,
Chalamala, Wu, Spector, Singhal, Ramesh, Ré, "LoLCATs: On Low-Rank Linearizing of Large Language
Models", ICLR 2025, arXiv 2410.10254.

    q, k, v = rotate(x W_q), rotate(x W_k), x W_v       of the attention that it replaces
    W_t = {t - window + 1, ..., t},   c_t = max_{s in W_t} q_t k_s / sqrt(K)
    num_t = sum_{s in W_t} g exp(q_t k_s / sqrt(K) - c_t) v_s + phi_q(q_t) S_t
    den_t = sum_{s in W_t} g exp(q_t k_s / sqrt(K) - c_t)     + phi_q(q_t) z_t
    S_t = sum_{s before W_t} phi_k(k_s)^T v_s,   z_t = sum_{s before W_t} phi_k(k_s)^T
    o_t = num_t / den_t,   y_t = o_t W_o
    phi(x) = [softmax(x W), softmax(-x W)]  or  relu(x W + b) (feature_map="relu", T2R; Kasai et
             al., EMNLP 2021, arXiv 2103.13076),   at least 1e-12

    q, k, v     q_BTHK, k_BTHK, v_BTHV      keys and values of grouped heads are repeated
    W           query_map_HKF, key_map_HKF  per head; they start as the identity
    b           query_bias_H, key_bias_H    start at 0
    g           sigmoid(mix_H)              0.1 at the start
    S, z        "memory" [B,H,F',V+1]       float32; z is its last column; F' = 2F, or F with relu

terraced=True is the window of the paper's main results: W_t has the tokens of t's block of `window`
tokens and of the block before, counted from the first token of a document. window=0 is linear
attention alone, S and z of all tokens up to t and 1e-12 added to den.

c_t is no neutral shift: it sets the scale at which the two parts mix.

stage="transfer" is the first of two. The layer gives on what softmax attention over
`context_length` tokens gives, so that all layers train at once, each on the teacher's inputs, and
reports 1000 times the mean square of the difference of the two o as its loss; no gradient reaches
q, k, v. stage="student" is the layer itself. Parameters have the names of models/transformer.py
beside the new ones, so that a run of either stage starts from the one before
(experiments/configs/lolcats.py).

State: F' H (V + 1) floats and the last `window` keys and values, twice as many if terraced. Cost
per token: O(F H V + window d).

Departures: none known.

Authors' code: https://github.com/HazyResearch/lolcats"""

import functools
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.normalised_attention import normalised_attention
from models.parts.options import Count, Epsilon, Range, Reach, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import merge_heads
from models.parts.rotary import RopeBase
from models.parts.variables import AUXILIARY_LOSS, TRANSFER_ERROR, report
from models.window_attention import WindowAttention
from ops.gated_linear_attention.api import gated_linear_attention
from ops.window_attention.api import init_window_state, pad_window_state, window_attention

STAGES = ("transfer", "student")
MIX_START = math.log(0.1 / 0.9)
LEAST = 1e-12
TRANSFER_WEIGHT = 1000.0


class Lolcats(WindowAttention):
    """x_BTD -> y_BTD; the state is {"past", "memory" [B,H,F',V+1], "position" [B] int32}, and
    "teacher", the `WindowState` of softmax attention, in the stage "transfer".

    "past" holds the last `reach` keys and values and whether they are there."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        window: Annotated[int, Range(0, 2**24)] = 64,
        terraced: bool = False,
        feature_map: str = "softmax",
        feature_size: Size = 64,
        stage: str = "student",
        context_length: Reach = 1024,
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
        check_choice("stage", stage, STAGES)
        check_choice("feature_map", feature_map, ("softmax", "relu"))
        self.transfers, self.context_length = stage == "transfer", context_length
        super().__init__(
            width,
            depth=depth,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            window=max(window, 1),
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
        self.window, self.reach, self.terraced = window, window * (1 + terraced), terraced
        self.features = feature_size * (1 if feature_map == "relu" else 2)
        start_HKF = jnp.broadcast_to(
            jnp.eye(self.head_size, feature_size), (heads, self.head_size, feature_size)
        )

        def matrices() -> nnx.Param:
            return nnx.Param(start_HKF.astype(param_dtype), out_sharding=("heads", None, None))

        self.query_map_HKF, self.key_map_HKF = matrices(), matrices()

        def per_head(value: float) -> nnx.Param:
            value_H = jnp.full((heads,), value, jnp.float32)
            return nnx.Param(value_H, group="no_decay", out_sharding=("heads",))

        self.mix_H = per_head(MIX_START) if window else None
        relu = feature_map == "relu"
        self.query_bias_H = per_head(0.0) if relu else None
        self.key_bias_H = per_head(0.0) if relu else None

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
        q_BTHK = self.rotated(q_BTHK, positions_BT).astype(self.compute_dtype)
        k_BTHK = self.rotated(k_BTHK, positions_BT).astype(self.compute_dtype)
        after: dict[str, Any] = {"position": next_position(positions_BT)}
        teacher_BTHV = None
        if self.transfers:
            q_BTHK, k_BTHK, v_BTHV = jax.lax.stop_gradient((q_BTHK, k_BTHK, v_BTHV))
            teacher_BTHV, teacher = window_attention(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                window=self.context_length,
                initial_state=state["teacher"],
                segment_ids=segment_ids,
            )
            after["teacher"] = pad_window_state(teacher, self.context_length)
        if self.window:
            o_BTHV, own = self.hybrid(q_BTHK, k_BTHK, v_BTHV, state, segment_ids, positions_BT)
        else:
            o_BTHV, memory = normalised_attention(
                self.phi_q(q_BTHK),
                self.phi_k(self.per_query_head(k_BTHK)),
                self.per_query_head(v_BTHV),
                eps=LEAST,
                initial_state=state["memory"],
                segment_ids=segment_ids,
            )
            own = {"past": state["past"], "memory": memory}
        if teacher_BTHV is not None:
            error = jnp.mean(jnp.square(o_BTHV - teacher_BTHV.astype(jnp.float32)))
            report(self, **{AUXILIARY_LOSS: TRANSFER_WEIGHT * error, TRANSFER_ERROR: error})
            o_BTHV = teacher_BTHV
        y_BTD = self.projected_out(merge_heads(o_BTHV).astype(self.compute_dtype), x_BTD)
        return y_BTD, after | own

    def hybrid(
        self,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        state: dict[str, Any],
        segment_ids: jax.Array | None,
        positions_BT: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """o, float32, and "past" and "memory" after the last token."""
        length, past = q_BTHK.shape[1], state["past"]
        ids_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        # The past first: token s of the call stands at reach + s.
        k, v = (
            jnp.concatenate((past[name], new.astype(past[name].dtype)), axis=1)
            for name, new in (("k", k_BTHK), ("v", v_BTHV))
        )
        # What is there of the past lies in the segment of the first token.
        ids = jnp.pad(ids_BT, ((0, 0), (self.reach, 0)), mode="edge")
        there = jnp.pad(past["there"], ((0, 0), (0, length)), constant_values=True)
        last = slice(k.shape[1] - self.reach, None)
        after = {
            "k": k[:, last],
            "v": v[:, last],
            "there": there[:, last] & (ids[:, last] == ids_BT[:, -1:]),
        }
        q = q_BTHK.astype(jnp.float32)
        k, v = (self.per_query_head(x.astype(jnp.float32)) for x in (k, v))
        phi_q, phi_k = self.phi_q(q), self.phi_k(k)
        num, den = self.near_part(q, k, v, ids, there, positions_BT, phi_q, phi_k)
        # The keys that get out of reach, if they are of the query's document.
        leaving = there[:, :length] & (ids[:, :length] == ids_BT)
        phi_k = phi_k[:, :length] * leaving[:, :, None, None]
        values = jnp.concatenate((v[:, :length], jnp.ones_like(v[:, :length, :, :1])), axis=-1)
        linear, memory = gated_linear_attention(
            phi_q, phi_k, values, scale=1.0, initial_state=state["memory"], segment_ids=segment_ids
        )
        o_BTHV = (num + linear[..., :-1]) / (den + linear[..., -1:])
        return o_BTHV, {"past": after, "memory": memory}

    def near_part(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        ids: jax.Array,
        there: jax.Array,
        positions_BT: jax.Array,
        phi_q: jax.Array,
        phi_k: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The share of the last `reach` keys in num [B, T, H, V] and den [B, T, H, 1].

        In blocks of `reach` queries, each of which reads the block of keys before it and its own.
        A terraced window is shorter for most queries; what is in reach beyond it has the weights of
        linear attention."""
        length, w = q.shape[1], self.reach
        missing = -length % w

        def blocks(x: jax.Array) -> jax.Array:
            """[B, n, W, ...], the end filled up."""
            widths = [(0, 0), (0, missing), *([(0, 0)] * (x.ndim - 2))]
            x = jnp.pad(x, widths, mode="edge")
            return x.reshape(x.shape[0], -1, w, *x.shape[2:])

        def pairs(x: jax.Array) -> jax.Array:
            x = blocks(x)
            return jnp.concatenate((x[:, :-1], x[:, 1:]), axis=2)

        q, k, v = blocks(q), pairs(k), pairs(v)
        query, key = jnp.arange(w)[:, None], jnp.arange(2 * w)[None, :]
        ago = query + w - key
        own_ids = blocks(ids[:, w:])
        seen = (own_ids[..., :, None] == pairs(ids)[..., None, :]) & pairs(there)[..., None, :]
        seen = (seen & ((ago >= 0) & (ago < w))[None, None])[:, :, None]
        near = seen
        if self.terraced:
            at = blocks(positions_BT)[..., None]
            since = at // self.window - (at - ago[None, None]) // self.window
            near = seen & (since <= 1)[:, :, None]
        scores = jnp.einsum("bnqhk,bnshk->bnhqs", q, k) * self.head_size**-0.5
        scores = jnp.where(near, scores, -jnp.inf)
        assert self.mix_H is not None
        mix = jax.nn.sigmoid(self.mix_H[...])[None, None, :, None, None]
        weight = mix * jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        if self.terraced:
            linear = jnp.einsum("bnqhf,bnshf->bnhqs", blocks(phi_q), pairs(phi_k))
            weight = weight + jnp.where(seen & ~near, linear, 0.0)
        num = jnp.einsum("bnhqs,bnshv->bnqhv", weight, v)
        den = jnp.swapaxes(jnp.sum(weight, axis=-1), 2, 3)[..., None]
        num, den = (x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length] for x in (num, den))
        return num, den

    def phi_q(self, q_BTHK: jax.Array) -> jax.Array:
        """Features of queries, [B, T, H, F'], float32."""
        return phi(q_BTHK, self.query_map_HKF, self.query_bias_H)

    def phi_k(self, k_BTHK: jax.Array) -> jax.Array:
        """Features of keys."""
        return phi(k_BTHK, self.key_map_HKF, self.key_bias_H)

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: nothing is there."""
        size = self.head_size
        keys = (batch, self.reach, self.key_value_heads, size)
        found: dict[str, Any] = {
            "past": {
                "k": jnp.zeros(keys, self.compute_dtype),
                "v": jnp.zeros(keys, self.compute_dtype),
                "there": jnp.zeros((batch, self.reach), bool),
            },
            "memory": jnp.zeros((batch, self.heads, self.features, size + 1), jnp.float32),
            "position": jnp.zeros((batch,), jnp.int32),
        }
        if self.transfers:
            found["teacher"] = init_window_state(
                batch, self.context_length, self.key_value_heads, size, size, self.compute_dtype
            )
        return found


def phi(x: jax.Array, kernel_HKF: nnx.Param, bias_H: nnx.Param | None) -> jax.Array:
    """Features of queries or keys [B, T, H, K]; those of T2R with a bias."""
    x, kernel = x.astype(jnp.float32), kernel_HKF[...].astype(jnp.float32)
    u = jnp.einsum("bthk,hkf->bthf", x, kernel)
    if bias_H is not None:
        return jnp.maximum(u + bias_H[...][None, None, :, None], LEAST)
    both = functools.partial(jax.nn.softmax, axis=-1)
    return jnp.maximum(jnp.concatenate((both(u), both(-u)), axis=-1), LEAST)


Mixer = Lolcats
