"""Normalised attention. Sieber, Amo Alonso, Didier, Zeilinger, Orvieto, "Understanding the
Differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",
NeurIPS 2024, arXiv 2405.15731.

    S_t = S_{t-1} + k_t^T v_t,    o_t = q_t S_t / eta_t,    eta_t = exp(w x_t + b)
    y_t = o_t W_o

Linear attention whose denominator is learned from the token that reads, in the place of the sum of
its scores. As a linear time-varying system it has the transition eta_{t-1} / eta_t, which may
exceed one, and writes k_t^T v_t / eta_t; it is computed without both, and divided last.

    q, k    q_BTHK, k_BTHK      x W_q + b_q, x W_k + b_k: state_size = H K channels each, no map
    v       v_BTHV              x W_v + b_v
    eta     eta_BTH             float32, per token and head; normaliser="exp", or "softplus" or
                                "sigmoid" of the same logit
    S       "memory" [B,H,K,V]  float32

State: state_size d / H floats. Cost per token: O(state_size d / H).

Departures: no dropout of scores, which a recurrence never forms. The paper's code was not
consulted; weights start as in the softmax baseline here, biases at zero, so that eta starts near 1.

Authors' code: https://github.com/IntelligentControlSystems/dsf-mqar
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Size, check_choice
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.gated_linear_attention.api import gated_linear_attention

NORMALISERS = {"exp": jnp.exp, "softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid}


class NormalisedAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V]}, float32."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 1,
        state_size: Size = 64,
        normaliser: str = "exp",
    ):
        check_choice("normaliser", normaliser, tuple(NORMALISERS))
        if state_size % heads:
            raise ValueError(f"heads must divide state_size={state_size}; got heads={heads}")
        dense = functools.partial(
            projection, bias=True, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.key_size, self.value_size = (
            heads,
            state_size // heads,
            head_size(width, heads),
        )
        self.normaliser, self.compute_dtype = normaliser, compute_dtype

        self.query = dense(width, state_size, ("embed", "heads"))
        self.key = dense(width, state_size, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.scale = dense(width, heads, ("embed", "heads"))
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
        # float32 values: their sum must not be rounded before it is divided.
        o_BTHV, memory = gated_linear_attention(
            split_heads(self.query(x_BTD), self.heads),
            split_heads(self.key(x_BTD), self.heads),
            split_heads(self.value(x_BTD), self.heads).astype(jnp.float32),
            scale=1.0,
            initial_state=(state or {}).get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        eta_BTH = NORMALISERS[self.normaliser](self.scale(x_BTD).astype(jnp.float32))
        o_BTD = merge_heads(o_BTHV / eta_BTH[..., None])
        return self.output(o_BTD.astype(self.compute_dtype)), {"memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32)
        return {"memory": memory}


Mixer = NormalisedAttention
