"""Sliding-window softmax attention. Beltagy, Peters, Cohan, "Longformer: The Long-Document
Transformer", 2020, arXiv 2004.05150; the mixer beside a recurrence in hybrids (Based, DeltaNet,
Samba and others).

    o_t = sum_{s in W_t} p_ts v_s,    p_t = softmax_{s in W_t}(q_t k_s / sqrt(K))
    W_t = {t - window + 1, ..., t}
    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK      x W_q, x W_k, optionally normalised per head (qk_norm), then
                                rotated (rope)
    v       v_BTHV              x W_v
    window  window              tokens that a query sees, itself included

State: the keys and values of the last window - 1 tokens, 2 (window - 1) key_value_heads K numbers
of the compute dtype. Cost per token: O(window d).

Departures: causal and without dilation or global tokens, as language models use it. Rotary
positions and grouped key/value heads are later additions (arXiv 2104.09864, 2305.13245), and so is
qk_norm (arXiv 2010.04245; here RMSNorm with a learned scale). Public checkpoints need more:
`size_per_head` is K where it is not d / heads, `rope_scaling` turns more slowly in long contexts
(models/parts/rotary.py), `rotary_size` turns the first channels of a head alone, `qkv_bias` and
`output_bias` add b to x W, `output_gate` multiplies o by sigmoid(x W_g), `zero_centred_norm`
has 1 + w for the scales of qk_norm, and `whole_norm` has qk_norm over all heads together.
Initialisation: N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/allenai/longformer
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import ZeroCentredRMSNorm, rms_norm
from models.parts.options import Count, Epsilon, Reach, Size
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import RopeBase, check_scaling, rotate
from ops.window_attention.api import init_window_state, pad_window_state, window_attention


class WindowAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"window": WindowState, "position" [B] int32}.

    "window" holds past values and rotated keys; "position" is where the next token stands when
    `positions` is not given."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        window: Reach,
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
        check_scaling(tuple(rope_scaling))
        if window < 1:
            raise ValueError(f"window must be at least 1 (the token itself); got {window}")
        # 0: as many as query heads.
        self.heads, self.key_value_heads = (heads, key_value_heads or heads)
        if heads % self.key_value_heads:
            raise ValueError(f"key_value_heads must divide heads={heads}; got {key_value_heads}")
        # 0: the heads share the model's width.
        self.head_size = size_per_head or head_size(width, heads)
        self.rotary_size = rotary_size or self.head_size  # 0: all channels
        if rope and (self.rotary_size % 2 or self.rotary_size > self.head_size):
            raise ValueError(
                "rope=True rotates pairs and needs an even head size, or an even rotary_size up to"
                f" it; got {self.rotary_size} of {self.head_size}: change heads, size_per_head,"
                " rotary_size or rope"
            )
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.window, self.rope, self.rope_base, self.compute_dtype = (
            window,
            rope,
            rope_base,
            jnp.dtype(compute_dtype),
        )

        self.rope_scaling = tuple(rope_scaling)
        query_width, key_width = (n * self.head_size for n in (heads, self.key_value_heads))
        self.query = dense(width, query_width, ("embed", "heads"), bias=qkv_bias)
        self.key = dense(width, key_width, ("embed", "heads"), bias=qkv_bias)
        self.value = dense(width, key_width, ("embed", "heads"), bias=qkv_bias)
        norm: Any = functools.partial(
            ZeroCentredRMSNorm if zero_centred_norm else rms_norm,
            eps=norm_eps,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.whole_norm = whole_norm
        widths = (query_width, key_width) if whole_norm else (self.head_size, self.head_size)
        self.query_norm, self.key_norm = (norm(w) if qk_norm else None for w in widths)
        self.output_gate = (
            dense(width, query_width, ("embed", "heads"), bias=qkv_bias) if output_gate else None
        )
        self.output = dense(
            query_width, width, ("heads", "embed"), init=residual_normal(depth), bias=output_bias
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
        start_B, window = (
            (state["position"], state["window"])
            if state
            else (jnp.zeros((batch,), jnp.int32), None)
        )
        positions_BT = token_positions(positions, start_B, length, segment_ids)

        q_BTHK, k_BTHK, v_BTHV = self.projected(x_BTD)
        q_BTHK = self.rotated(q_BTHK, positions_BT)
        k_BTHK = self.rotated(k_BTHK, positions_BT)
        o_BTHV, window = window_attention(
            q_BTHK.astype(self.compute_dtype),
            k_BTHK.astype(self.compute_dtype),
            v_BTHV,
            window=self.window,
            initial_state=window,
            segment_ids=segment_ids,
        )
        y_BTD = self.projected_out(merge_heads(o_BTHV), x_BTD)
        window = pad_window_state(window, self.window)
        return y_BTD, {"window": window, "position": next_position(positions_BT)}

    def projected(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v, before any rotation."""
        q_BTD, k_BTD = self.query(x_BTD), self.key(x_BTD)
        norms: Any = self.query_norm and (self.query_norm, self.key_norm)
        if norms and self.whole_norm:
            q_BTD, k_BTD = norms[0](q_BTD), norms[1](k_BTD)
        q_BTHK = split_heads(q_BTD, self.heads)
        k_BTHK = split_heads(k_BTD, self.key_value_heads)
        v_BTHV = split_heads(self.value(x_BTD), self.key_value_heads)
        if norms and not self.whole_norm:
            q_BTHK, k_BTHK = norms[0](q_BTHK), norms[1](k_BTHK)
        return q_BTHK, k_BTHK, v_BTHV

    def projected_out(self, o_BTD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """o W_o, behind the gate if there is one."""
        if self.output_gate is not None:
            o_BTD = o_BTD * jax.nn.sigmoid(self.output_gate(x_BTD))
        return self.output(o_BTD)

    def per_query_head(self, x_BTHK: jax.Array) -> jax.Array:
        """Keys or values of grouped heads, one for each head of queries."""
        return jnp.repeat(x_BTHK, self.heads // self.key_value_heads, axis=2)

    def rotated(self, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Queries or keys with their first `rotary_size` channels turned; as they are without
        rope."""
        if not self.rope:
            return x_BTHK
        turned, rest = jnp.split(x_BTHK, [self.rotary_size], axis=-1)
        turned = rotate(turned, positions_BT, base=self.rope_base, scaling=self.rope_scaling)
        return jnp.concatenate((turned, rest), axis=-1) if rest.shape[-1] else turned

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: an empty window at position 0."""
        window = init_window_state(
            batch,
            self.window,
            self.key_value_heads,
            self.head_size,
            self.head_size,
            self.compute_dtype,
        )
        return {"window": window, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = WindowAttention
