"""qLSTM, an LSTM whose gates do not read the state, and its reversed form. Sieber, Amo Alonso,
Didier, Zeilinger, Orvieto, "Understanding the Differences in Foundation Models: Attention, State
Space Models, and Recurrent Neural Networks", NeurIPS 2024, arXiv 2405.15731.

    [g, u] = x W_in,    u <- conv(u) + b_conv,    [f, i, o] = u W_gates + b_gates
    h_t = sigmoid(f_t) h_{t-1} + sigmoid(i_t) u_t                       per channel
    y_t = (gelu(g_t) sigmoid(o_t) h_t) W_out

forget="reversed" has the forget gate sigmoid(-f_t)^relu(alpha), alpha a learned scalar. As exp(-a
softplus(f)) = sigmoid(-f)^a, that is the decay of S6 (`mamba`) with the step softplus(f) and one a
for all channels: what is left between the two is that S6 writes with the step of its decay, and has
more than one state per channel.

    x           x_BTD           input, model width D
    g, u        g_BTE, u_BTE    E = expand * width inner channels
    f, i, o     f_BTE, ...      float32
    alpha       alpha_1         float32, starts at 1; at 0 nothing is forgotten, and it stays there
    h           "memory" [B,E]  float32

State: E floats, and (W - 1) E for the convolution. Cost per token: O(E) beside the projections. One
homogeneous block: use it with mlp="none".

Departures: weights start as N(0, 1 / inputs), as in the paper, W_out smaller by sqrt(2 depth).
W_in and W_gates are stored as their parts, so that each shards by itself. Biases start at zero.

Authors' code: https://github.com/IntelligentControlSystems/dsf-mqar
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Factor, check_choice
from models.parts.projections import projection
from models.parts.short_convolution import ConvWidth, ShortConvolution
from ops.diagonal_scan.api import diagonal_scan


class QuasiLSTM(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv" [B,W-1,E], "memory" [B,E]}, float32."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        expand: Factor = 2.0,
        forget: str = "sigmoid",
        conv_width: ConvWidth = 4,
    ):
        check_choice("forget", forget, ("sigmoid", "reversed"))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        inner = round(expand * width)
        self.inner, self.compute_dtype = inner, compute_dtype

        def dense(inputs: int, outputs: int, axes: Any, *, bias: bool = False, share: float = 1.0):
            init = nnx.initializers.normal(share / math.sqrt(inputs))
            return projection(inputs, outputs, axes, init=init, bias=bias, rngs=rngs, **dtypes)

        self.input = dense(width, inner, ("embed", "heads"))
        self.gate = dense(width, inner, ("embed", "heads"))
        self.conv = ShortConvolution(inner, conv_width, bias=True, rngs=rngs, **dtypes)
        gate = functools.partial(dense, inner, inner, (None, "heads"), bias=True)
        self.forget_gate, self.input_gate, self.output_gate = gate(), gate(), gate()
        # float32 whatever param_dtype is: it is an exponent.
        self.alpha_1 = (
            nnx.Param(jnp.ones((1,), jnp.float32), group="ssm", out_sharding=(None,))
            if forget == "reversed"
            else None
        )
        self.output = dense(inner, width, ("heads", "embed"), share=1 / math.sqrt(2 * depth))

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
        u_BTE, conv = self.conv(self.input(x_BTD), state.get("conv"), segment_ids, reverse)
        i_BTE = jax.nn.sigmoid(self.input_gate(u_BTE).astype(jnp.float32))
        o_BTE = jax.nn.sigmoid(self.output_gate(u_BTE).astype(jnp.float32))
        h_BTE, memory = diagonal_scan(
            self.decay(self.forget_gate(u_BTE).astype(jnp.float32)),
            i_BTE * u_BTE.astype(jnp.float32),
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        g_BTE = jax.nn.gelu(self.gate(x_BTD).astype(jnp.float32), approximate=False)
        y_BTD = self.output((g_BTE * o_BTE * h_BTE).astype(self.compute_dtype))
        return y_BTD, {"conv": conv, "memory": memory}

    def decay(self, f_BTE: jax.Array) -> jax.Array:
        """The factor of the state for logits of the forget gate, in [0, 1]."""
        if self.alpha_1 is None:
            return jax.nn.sigmoid(f_BTE)
        # sigmoid(-f)^a, through its logarithm: the power of a number that rounds to 0 has no
        # gradient.
        alpha_111 = jax.nn.relu(self.alpha_1[...])[None, None, :]
        return jnp.exp(-alpha_111 * jax.nn.softplus(f_BTE))

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.inner), jnp.float32)
        return {"conv": self.conv.init_state(batch), "memory": memory}


Mixer = QuasiLSTM
