"""Mamba-2. Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", ICML 2024, arXiv 2405.21060.

    [z, x, B, C, dt] = u W_in,    [x, B, C] <- silu(conv([x, B, C]) + b_conv)
    Delta = softplus(dt + b_dt)
    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t^T x_t                        (Eq. 1, per head)
    y_t = C_t h_t + D x_t
    out = norm(y silu(z)) W_out,    norm over all heads together            (Section 7.1, Fig. 6)

    u       x_BTD               input, model width d
    x, z    x_BTHP, z_BTE       E = expand * d inner channels in H heads of P
    B, C    B_BTGN, C_BTGN      G groups, each shared by H / G heads: keys and queries
    Delta   dt_BTH              float32, one per head
    A       -exp(a_log_H)       scalar per head; A starts as -U(1, 16)
    D       skip_H              starts at 1
    h       "memory" [B,H,N,P]  float32

Structured state space duality: h is the matrix state of linear attention with a scalar decay per
head, queries C, keys B and values Delta x, and is computed so.

State: E N floats, and (W - 1) (E + 2 G N) for the convolutions. Cost per token: O(E N). About 6 d^2
parameters per block, one homogeneous block: use it with mlp="none".

norm_groups > 1 normalises so many parts of the channels by themselves, as the released models with
several groups do.

Departures: W_in and the convolution are stored as their parts, so that each shards by itself; the
distributions are the same. Zero-order hold for A, Euler for B, as in Mamba's code. `bias` and
`conv_bias` as there.

Authors' code: https://github.com/state-spaces/mamba
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import dt_bias
from models.parts.norms import rms_norm, simple_rms_norm
from models.parts.options import Count, Epsilon, Factor, Size, check_choice
from models.parts.projections import FAN_IN_UNIFORM, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth, ShortConvolution
from ops.gated_linear_attention.api import gated_linear_attention


class Mamba2(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv_x", "conv_B", "conv_C", "memory" [B,H,N,P]}, float32."""

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
        heads: Count = 0,
        groups: Size = 1,
        state_size: Size = 128,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        conv_width: ConvWidth = 4,
        norm: str = "after_gate",
        norm_eps: Epsilon = 1e-5,
        norm_groups: Size = 1,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        check_choice("norm", norm, ("after_gate", "before_gate"))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=FAN_IN_UNIFORM, rngs=rngs, **dtypes)
        inner = round(expand * width)
        self.heads = heads or max(1, inner // 64)  # 0: the paper's heads of 64 channels
        self.head_size = head_size(width, self.heads, expand)
        if groups < 1 or self.heads % groups:
            raise ValueError(f"groups must divide the {self.heads} heads; got {groups}")
        self.groups, self.state_size, self.compute_dtype = (groups, state_size, compute_dtype)
        self.norm_after_gate = norm == "after_gate"
        if inner % norm_groups:
            raise ValueError(f"norm_groups must divide the {inner} channels; got {norm_groups}")
        self.norm_groups, self.norm_eps = norm_groups, norm_eps

        self.input = dense(width, inner, ("embed", "heads"), bias=bias)
        self.gate = dense(width, inner, ("embed", "heads"), bias=bias)
        self.write = dense(width, groups * state_size, ("embed", None), bias=bias)
        self.read = dense(width, groups * state_size, ("embed", None), bias=bias)
        self.dt = dense(width, self.heads, ("embed", "heads"), bias=bias)
        self.conv_x = ShortConvolution(inner, conv_width, bias=conv_bias, rngs=rngs, **dtypes)
        self.conv_B = ShortConvolution(
            groups * state_size, conv_width, bias=conv_bias, rngs=rngs, **dtypes
        )
        self.conv_C = ShortConvolution(
            groups * state_size, conv_width, bias=conv_bias, rngs=rngs, **dtypes
        )
        # float32 whatever param_dtype is: they enter exponentials. No weight decay: zero is no
        # neutral value for them.
        dt_bias_H = dt_bias(rngs.params(), self.heads, dt_min, dt_max)
        self.dt_bias_H = nnx.Param(dt_bias_H, group="ssm", out_sharding=("heads",))
        a_log_H = jnp.log(jax.random.uniform(rngs.params(), (self.heads,), jnp.float32, 1, 16))
        self.a_log_H = nnx.Param(a_log_H, group="ssm", out_sharding=("heads",))
        self.skip_H = nnx.Param(
            jnp.ones((self.heads,), jnp.float32), group="no_decay", out_sharding=("heads",)
        )
        self.norm = rms_norm(inner, eps=norm_eps, axis="heads", rngs=rngs, param_dtype=param_dtype)
        # Only W_out writes to the residual stream, once per block: its U(+-E^-1/2) is divided by
        # sqrt(depth).
        self.output = dense(
            inner,
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
        state = state or {}
        given = (segment_ids, reverse)
        x_BTE, conv_x = self.conv_x(self.input(x_BTD), state.get("conv_x"), *given)
        B_BTE, conv_B = self.conv_B(self.write(x_BTD), state.get("conv_B"), *given)
        C_BTE, conv_C = self.conv_C(self.read(x_BTD), state.get("conv_C"), *given)
        x_BTHP = split_heads(jax.nn.silu(x_BTE), self.heads).astype(jnp.float32)
        dt_BTH = jax.nn.softplus(
            self.dt(x_BTD).astype(jnp.float32) + self.dt_bias_H[...][None, None, :]
        )
        # Eq. 1
        y_BTHP, memory = gated_linear_attention(
            split_heads(jax.nn.silu(C_BTE), self.groups),
            split_heads(jax.nn.silu(B_BTE), self.groups),
            dt_BTH[..., None] * x_BTHP,
            -jnp.exp(self.a_log_H[...])[None, None, :] * dt_BTH,
            scale=1.0,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTE = merge_heads(y_BTHP + self.skip_H[...][None, None, :, None] * x_BTHP)
        # Section 7.1, Fig. 6
        gate_BTE = jax.nn.silu(self.gate(x_BTD)).astype(jnp.float32)
        if self.norm_after_gate:
            y_BTE = self.normalised(y_BTE * gate_BTE)
        else:
            y_BTE = self.normalised(y_BTE) * gate_BTE
        y_BTD = self.output(y_BTE.astype(self.compute_dtype))
        return y_BTD, {"conv_x": conv_x, "conv_B": conv_B, "conv_C": conv_C, "memory": memory}

    def normalised(self, y_BTE: jax.Array) -> jax.Array:
        """RMSNorm over each of `norm_groups` parts of the channels, in float32."""
        if self.norm_groups == 1:
            return self.norm(y_BTE)
        y_BTGP = simple_rms_norm(split_heads(y_BTE, self.norm_groups), self.norm_eps)
        scale_E = jnp.asarray(self.norm.scale[...], jnp.float32)  # pyright: ignore[reportOptionalSubscript]
        return merge_heads(y_BTGP) * scale_E[None, None, :]

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            "conv_x": self.conv_x.init_state(batch),
            "conv_B": self.conv_B.init_state(batch),
            "conv_C": self.conv_C.init_state(batch),
            "memory": jnp.zeros((batch, self.heads, self.state_size, self.head_size), jnp.float32),
        }


Mixer = Mamba2
