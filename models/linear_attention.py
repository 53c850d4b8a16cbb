"""Linear attention. Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast
Autoregressive Transformers with Linear Attention", ICML 2020, arXiv 2006.16236.

    S_t = S_{t-1} + phi(k_t)^T v_t                                (Eq. 18)
    z_t = z_{t-1} + phi(k_t)                                      (Eq. 19)
    o_t = phi(q_t) S_t / (phi(q_t) z_t)                           (Eq. 20)
    phi(x) = elu(x) + 1                                           (Eq. 7)

    q, k    q_BTHK, k_BTHK      x W_q, x W_k
    v       v_BTHV              x W_v; with the denominator a column of ones is appended
    S, z    "memory" [B,H,K,V+1]   z is the last column of S: the same sum with v = 1
    phi     feature_map         "elu" (elu + 1) or "identity"

State: H K (V+1) floats. Cost per token: O(H K V).

Departures: no biases (as in later linear-attention layers).
`normaliser="rms_norm"` replaces the denominator by an RMSNorm of each head's output and scales
queries by K^-1/2; a map that can be negative (identity) needs it, because a denominator of mixed
signs passes through zero. `conv_width` > 0 puts a causal depthwise convolution and SiLU after each
of the three projections, as DeltaNet has it, for comparisons at equal surroundings; the paper has
none.

Authors' code: https://github.com/idiap/fast-transformers
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.convolved_projections import ConvolvedProjections
from models.parts.normalised_attention import normalised_attention
from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Factor, Size, check_choice
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.short_convolution import ConvWidth
from ops.gated_linear_attention.api import gated_linear_attention

FEATURE_MAPS = {"elu": lambda x: jax.nn.elu(x) + 1, "identity": lambda x: x}
DENOMINATOR_EPS = 1e-10


class LinearAttention(ConvolvedProjections):
    """x_BTD -> y_BTD; the state is {"conv_q", "conv_k", "conv_v", "memory" [B,H,K,V or V+1]}.

    All of it is float32."""

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
        expand_k: Factor = 1.0,
        expand_v: Factor = 1.0,
        feature_map: str = "elu",
        normaliser: str = "denominator",
        conv_width: ConvWidth = 0,
        norm_eps: Epsilon = 1e-5,
    ):
        check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
        check_choice("normaliser", normaliser, ("denominator", "rms_norm"))
        if feature_map == "identity" and normaliser == "denominator":
            raise ValueError(
                'feature_map="identity" needs normaliser="rms_norm": a sum of signed'
                " scores can be zero"
            )
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, rngs=rngs, **dtypes)
        self.heads, self.feature_map, self.compute_dtype = (heads, feature_map, compute_dtype)
        self.key_size = head_size(width, heads, expand_k)
        self.value_size = head_size(width, heads, expand_v)
        key_width, value_width = heads * self.key_size, heads * self.value_size

        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.add_convolutions(key_width, value_width, conv_width, rngs=rngs, **dtypes)
        norm = functools.partial(
            rms_norm, self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype
        )
        self.norm = norm() if normaliser == "rms_norm" else None
        self.output = dense(value_width, width, ("heads", "embed"), init=residual_normal(depth))

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
        phi = FEATURE_MAPS[self.feature_map]
        q_BTD, k_BTD, v_BTD, convolutions = self.convolved(
            x_BTD, state, segment_ids, reverse=reverse
        )
        if self.conv_q.width:
            q_BTD, k_BTD, v_BTD = (jax.nn.silu(q_BTD), jax.nn.silu(k_BTD), jax.nn.silu(v_BTD))
        q_BTHK = phi(split_heads(q_BTD, self.heads))
        k_BTHK = phi(split_heads(k_BTD, self.heads))
        v_BTHV = split_heads(v_BTD, self.heads)

        past: dict[str, Any] = {
            "initial_state": state.get("memory"),
            "segment_ids": segment_ids,
            "reverse": reverse,
        }
        if self.norm is None:
            # Eq. 18 - 20
            o_BTHV, memory = normalised_attention(
                q_BTHK, k_BTHK, v_BTHV, eps=DENOMINATOR_EPS, **past
            )
        else:
            o_BTHV, memory = gated_linear_attention(q_BTHK, k_BTHK, v_BTHV, **past)
            o_BTHV = self.norm(o_BTHV)
        y_BTD = self.output(merge_heads(o_BTHV.astype(self.compute_dtype)))
        return y_BTD, {**convolutions, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        columns = self.value_size + (self.norm is None)
        return {
            **self.init_convolutions(batch),
            "memory": jnp.zeros((batch, self.heads, self.key_size, columns), jnp.float32),
        }


Mixer = LinearAttention
