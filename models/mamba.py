"""Mamba. Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", COLM 2024,
arXiv 2312.00752. With eigenvalue_range=(-1, 1): Grazzi et al., ICLR 2025, arXiv 2411.12537.

    [x, z] = u W_in,    x <- silu(conv(x) + b_conv)         (Section 3.4, Fig. 3)
    [delta, B, C] = x W_x,    Delta = softplus(delta W_dt + b_dt)
    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t          (Eq. 2a, per channel and state; Alg. 2)
    y_t = C_t h_t + D x_t                                   (Eq. 2b)
    out = (y silu(z)) W_out                                 (Section 3.4, Fig. 3)

    u       x_BTD               input, model width D
    x, z    x_BTE, z_BTE        E = expand * width inner channels
    Delta   delta_BTE           float32; through a bottleneck of dt_rank R = ceil(D / 16)
    B, C    B_BTN, C_BTN        shared by all channels
    A       A_EN                -exp(a_log_EN), starts as A[:, n] = -(n + 1) (S4D-Real)
    D       skip_E              starts at 1
    h       "memory" [B,E,N]    float32

State: E N floats, and (W - 1) E for the convolution. Cost per token: O(E N) beside the projections.
One homogeneous block: use it with mlp="none".

eigenvalue_range=(-1, 1) replaces the factor exp(Delta A) by 2 exp(Delta A) - 1, nothing else.

Departures: the discretisation is the authors' code's: zero-order hold for A, Euler for B (the text
of the paper has zero-order hold for both). W_in is stored as its two halves, W_x as its parts, so
that each shards by itself; the distributions are the same. `bias` and `conv_bias` are as in
the authors' code.

Authors' code: https://github.com/state-spaces/mamba
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import dt_bias
from models.parts.options import Count, Factor, Size, check_choice
from models.parts.projections import FAN_IN_UNIFORM, projection
from models.parts.short_convolution import ConvWidth, ShortConvolution
from ops.selective_scan.api import selective_scan


class Mamba(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv" [B,W-1,E], "memory" [B,E,N]}, float32."""

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
        state_size: Size = 16,
        dt_rank: Count = 0,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        conv_width: ConvWidth = 4,
        eigenvalue_range: tuple[int, int] = (0, 1),
        bias: bool = False,
        conv_bias: bool = True,
    ):
        check_choice("eigenvalue_range", tuple(eigenvalue_range), ((0, 1), (-1, 1)))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=FAN_IN_UNIFORM, rngs=rngs, **dtypes)
        self.eigenvalue_range = eigenvalue_range
        self.inner, self.state_size, self.compute_dtype = (
            round(expand * width),
            state_size,
            compute_dtype,
        )
        dt_rank = dt_rank or math.ceil(width / 16)  # 0: the paper's rule

        self.input = dense(width, self.inner, ("embed", "heads"), bias=bias)
        self.gate = dense(width, self.inner, ("embed", "heads"), bias=bias)
        self.conv = ShortConvolution(self.inner, conv_width, bias=conv_bias, rngs=rngs, **dtypes)
        self.dt_in = dense(self.inner, dt_rank, ("heads", None))
        self.write = dense(self.inner, state_size, ("heads", None))
        self.read = dense(self.inner, state_size, ("heads", None))
        self.dt_out = dense(dt_rank, self.inner, (None, "heads"))
        # float32 whatever param_dtype is: they enter exponentials. No weight decay: zero is no
        # neutral value for them.
        self.dt_bias_E = nnx.Param(
            dt_bias(rngs.params(), self.inner, dt_min, dt_max), group="ssm", out_sharding=("heads",)
        )
        a_log_N = jnp.log(jnp.arange(1, state_size + 1, dtype=jnp.float32))
        a_log_EN = jnp.broadcast_to(a_log_N[None, :], (self.inner, state_size))
        self.a_log_EN = nnx.Param(a_log_EN, group="ssm", out_sharding=("heads", None))
        self.skip_E = nnx.Param(
            jnp.ones((self.inner,), jnp.float32), group="no_decay", out_sharding=("heads",)
        )
        # Only W_out writes to the residual stream, once per block: its U(+-E^-1/2) is divided by
        # sqrt(depth).
        self.output = dense(
            self.inner,
            width,
            ("heads", "embed"),
            init=nnx.initializers.variance_scaling(1 / (3 * depth), "fan_in", "uniform"),
            bias=bias,
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
        y_BTE, state = self.scan(
            self.input(x_BTD), self.gate(x_BTD), state, segment_ids=segment_ids, reverse=reverse
        )
        return self.output(y_BTE), state

    def scan(
        self,
        x_BTE: jax.Array,
        z_BTE: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """What lies between W_in and W_out: y silu(z) [B, T, E] of x before its convolution."""
        state = state or {}
        x_BTE, conv = self.conv(x_BTE, state.get("conv"), segment_ids, reverse)
        x_BTE = jax.nn.silu(x_BTE)
        # Eq. 2a and 2b; the gate silu(z) of Fig. 3
        y_BTE, memory = selective_scan(
            x_BTE,
            self.dt_out(self.dt_in(x_BTE)),
            -jnp.exp(self.a_log_EN[...]),
            self.write(x_BTE),
            self.read(x_BTE),
            D=self.skip_E[...],
            z=z_BTE,
            delta_bias=self.dt_bias_E[...],
            delta_softplus=True,
            eigenvalue_range=self.eigenvalue_range,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        return y_BTE, {"conv": conv, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        memory = jnp.zeros((batch, self.inner, self.state_size), jnp.float32)
        return {"conv": self.conv.init_state(batch), "memory": memory}


Mixer = Mamba
