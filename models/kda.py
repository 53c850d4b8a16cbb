"""KDA, Kimi Delta Attention. Kimi Team, "Kimi Linear: An Expressive, Efficient Attention
Architecture", 2025, arXiv 2510.26692.

    S_t = (I - beta_t k_t^T k_t) Diag(alpha_t) S_{t-1} + beta_t k_t^T v_t                   (Eq. 1)
    o_t = q_t S_t / sqrt(K)
    q, k = l2norm(silu(conv(x W_{q,k}))),    v = silu(conv(x W_v)),    beta = sigmoid(x W_beta)
    log alpha_t = -exp(a_log) softplus((x_t W_1) W_2 + b_dt)
    y_t = (sigmoid((x_t W_3) W_4 + b_4) * norm(o_t)) W_o,    norm per head

    q, k        q_BTHK, k_BTHK          unit norm per head
    v           v_BTHV
    beta        beta_BTH                in (0, 1)
    log alpha   decay_log_BTHK          float32, per key channel; W_1 [d, V], W_2 [V, H K]
    a_log, b_dt a_log_H, dt_bias_HK     exp(a_log) from U(1, 16), per head; softplus(b_dt)
                                        log-uniform on [dt_min, dt_max], per channel
    S           "memory" [B,H,K,V]      float32

The erase term reads the state after its decay. Heads have 128 channels in the paper (H = d / 128),
which is also the rank of both low-rank maps.

State: H K V floats, and 3 (W - 1) d for the convolutions. Cost per token: O(H K V).

Departures: without `gate_bias` there is no b_4, as in the published checkpoints. Ranks and initial
values follow the authors' layer, which the report does not state. Its optional gate with a lower
bound is left out: it keeps a kernel's factorised exponentials in range, and the op here has no such
limit. Initialisation: Xavier-uniform with gain 2^-2.5.

Authors' code: https://github.com/fla-org/flash-linear-attention
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
from models.parts.options import Epsilon, Factor, Size
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from ops.delta_rule.api import delta_rule


class KimiDeltaAttention(ConvolvedProjections):
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
        heads: Size = 4,
        expand_k: Factor = 1.0,
        expand_v: Factor = 1.0,
        conv_width: ConvWidth = 4,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        norm_eps: Epsilon = 1e-5,
        gate_bias: bool = True,
    ):
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.compute_dtype = heads, compute_dtype
        self.key_size = head_size(width, heads, expand_k)
        self.value_size = head_size(width, heads, expand_v)
        key_width, value_width = heads * self.key_size, heads * self.value_size

        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.beta = dense(width, heads, ("embed", "heads"))
        self.add_convolutions(key_width, value_width, conv_width, rngs=rngs, **dtypes)
        self.dt_in = dense(width, self.value_size, ("embed", None))
        self.dt_out = dense(self.value_size, key_width, (None, "heads"))
        # float32 whatever param_dtype is: they enter exponentials.
        a_log_H = jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16))
        self.a_log_H = nnx.Param(a_log_H, group="no_decay", out_sharding=("heads",))
        dt_bias_HK = dt_bias(rngs.params(), key_width, dt_min, dt_max).reshape(heads, self.key_size)
        self.dt_bias_HK = nnx.Param(dt_bias_HK, group="no_decay", out_sharding=("heads", None))
        self.norm = rms_norm(self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        self.output_gate_in = dense(width, self.value_size, ("embed", None))
        self.output_gate_out = dense(self.value_size, value_width, (None, "heads"), bias=gate_bias)
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
        dt_BTHK = split_heads(self.dt_out(self.dt_in(x_BTD)).astype(jnp.float32), self.heads)
        dt_BTHK = jax.nn.softplus(dt_BTHK + self.dt_bias_HK[...][None, None, :, :])
        # Eq. 1
        o_BTHV, memory = delta_rule(
            q_BTHK.astype(self.compute_dtype),
            k_BTHK.astype(self.compute_dtype),
            split_heads(jax.nn.silu(v_BTD), self.heads),
            jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)),
            -jnp.exp(self.a_log_H[...])[None, None, :, None] * dt_BTHK,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        o_BTD = merge_heads(self.norm(o_BTHV)).astype(self.compute_dtype)
        y_BTD = self.output(
            jax.nn.sigmoid(self.output_gate_out(self.output_gate_in(x_BTD))) * o_BTD
        )
        return y_BTD, {**convolutions, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            **self.init_convolutions(batch),
            "memory": jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32),
        }


Mixer = KimiDeltaAttention
