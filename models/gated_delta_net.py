"""Gated DeltaNet. Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta
Rule", ICLR 2025, arXiv 2412.06464. With eigenvalue_range=(-1, 1): Grazzi et al., ICLR 2025, arXiv
2411.12537.

    S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t                        (Eq. 10)
    o_t = q_t S_t / sqrt(K)
    q, k = l2norm(silu(conv(x W_{q,k}))),    v = silu(conv(x W_v)),    beta = sigmoid(x W_beta)
    log alpha_t = -exp(a_log) softplus(x_t W_a + b_dt)
    y_t = (norm(o_t) * silu(x_t W_g)) W_o,    norm per head

    q, k        q_BTHK, k_BTHK      unit norm per head; heads * K = expand_k d = 0.75 d
    v           v_BTHV              heads * V = expand_v d = 1.5 d; value_heads may be a multiple
                                    of heads, and so many neighbours then read one key head
    beta        beta_BTH            in (0, 1), or in (0, 2) with eigenvalue_range=(-1, 1)
    log alpha   decay_log_BTH       float32, one per head
    a_log, b_dt a_log_H, dt_bias_H  exp(a_log) from U(0, 16); softplus(b_dt) log-uniform on
                                    [dt_min, dt_max]
    S           "memory" [B,H,K,V]  float32

alpha forgets all of the state at once, beta edits one association in it.

State: H K V floats, and (W - 1) 3 d for the convolutions. Cost per token: O(H K V). With the
defaults the mixer has about 6 d^2 parameters.

Departures: the paper leaves the formula of alpha out; it is the one of the authors' code (that of
Mamba-2). Initialisation: Xavier-uniform with gain 2^-2.5.

Authors' code: https://github.com/NVlabs/GatedDeltaNet,
https://github.com/fla-org/flash-linear-attention
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.convolved_projections import ConvolvedProjections
from models.parts.discretisation import dt_bias
from models.parts.norms import l2_normalise, rms_norm
from models.parts.options import Count, Epsilon, Factor, Size, check_choice
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from ops.delta_rule.api import delta_rule


class GatedDeltaNet(ConvolvedProjections):
    """x_BTD -> y_BTD; the state is {"conv_q", "conv_k", "conv_v", "memory" [B,H,K,V]}, float32."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 6,
        expand_k: Factor = 0.75,
        expand_v: Factor = 1.5,
        conv_width: ConvWidth = 4,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        eigenvalue_range: tuple[int, int] = (0, 1),
        norm_eps: Epsilon = 1e-5,
        value_heads: Count = 0,
    ):
        check_choice("eigenvalue_range", tuple(eigenvalue_range), ((0, 1), (-1, 1)))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.compute_dtype = heads, compute_dtype
        # The moving eigenvalue is alpha (1 - beta).
        self.beta_max = 1 - min(eigenvalue_range)
        self.key_size = head_size(width, heads, expand_k)
        self.value_heads = value_heads or heads  # 0: as many
        if self.value_heads % heads:
            raise ValueError(f"value_heads must be a multiple of heads={heads}; got {value_heads}")
        self.value_size = head_size(width, self.value_heads, expand_v)
        key_width, value_width = heads * self.key_size, self.value_heads * self.value_size

        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.beta = dense(width, self.value_heads, ("embed", "heads"))
        self.add_convolutions(key_width, value_width, conv_width, rngs=rngs, **dtypes)
        self.dt = dense(width, self.value_heads, ("embed", "heads"))
        # float32 whatever param_dtype is: they enter exponentials. 1 - u is in (0, 1]: no logarithm
        # of 0.
        shape = (self.value_heads,)
        a_log_H = jnp.log(16 * (1 - jax.random.uniform(rngs.params(), shape, jnp.float32)))
        self.a_log_H = nnx.Param(a_log_H, group="no_decay", out_sharding=("heads",))
        dt_bias_H = dt_bias(rngs.params(), self.value_heads, dt_min, dt_max)
        self.dt_bias_H = nnx.Param(dt_bias_H, group="no_decay", out_sharding=("heads",))
        self.norm = rms_norm(self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.output_gate = dense(width, value_width, ("embed", "heads"))
        self.output = dense(value_width, width, ("heads", "embed"))

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
        q_BTD, k_BTD, v_BTD, convolutions = self.convolved(
            x_BTD, state, segment_ids, reverse=reverse
        )
        q_BTHK = l2_normalise(split_heads(jax.nn.silu(q_BTD), self.heads))
        k_BTHK = l2_normalise(split_heads(jax.nn.silu(k_BTD), self.heads))
        dt_BTH = jax.nn.softplus(
            self.dt(x_BTD).astype(jnp.float32) + self.dt_bias_H[...][None, None, :]
        )
        # Eq. 10
        o_BTHV, memory = delta_rule(
            q_BTHK.astype(self.compute_dtype),
            k_BTHK.astype(self.compute_dtype),
            split_heads(jax.nn.silu(v_BTD), self.value_heads),
            self.beta_max * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)),
            -jnp.exp(self.a_log_H[...])[None, None, :] * dt_BTH,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        o_BTD = merge_heads(self.norm(o_BTHV)).astype(self.compute_dtype)
        y_BTD = self.output(o_BTD * jax.nn.silu(self.output_gate(x_BTD)))
        return y_BTD, {**convolutions, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            **self.init_convolutions(batch),
            "memory": jnp.zeros(
                (batch, self.value_heads, self.key_size, self.value_size), jnp.float32
            ),
        }


Mixer = GatedDeltaNet
