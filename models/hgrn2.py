"""HGRN2. Qin, Yang, Sun, Shen, Li, Sun, Zhong, "HGRN2: Gated Linear RNNs with State Factor",
COLM 2024, arXiv 2404.07904; the lower bounds are from HGRN, NeurIPS 2023, arXiv 2311.04823.

    S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T v_t,    o_t = q_t S_t
    f_t = lb_l + (1 - lb_l) sigmoid(x_t W_f),    q_t = swish(x_t W_q),    v_t = x_t W_v
    y_t = norm(o_t) W_o,    norm over all heads together
    P = softmax(Gamma) over layers,  lb_l = sum_{0 < i <= l} P_i,  1 - lb_l = P_0 + sum_{i > l} P_i

    q, 1 - f    q_BTHK, k_BTHK      heads * K = d: the key is what the gate does not keep
    v           v_BTHV              heads * V = d
    log f       decay_log_BTHK      float32
    Gamma       gamma_LD            float32, one of the whole network; L counts this mixer's layers
    log P       p_log_LD            float32
    lb_l        lower bound of the l-th of them, per channel: 0 in the first, increasing, below 1
    S           "memory" [B,H,K,V]  float32; each row is a running convex mean of values

State: d^2 / H floats; heads have 128 channels in the paper (H = d / 128). Cost per token: O(d^2/H).

Gamma starts at 0: lb_l = l / L. A sum over i < l instead gives the same bounds with Gamma's rows
numbered otherwise. In a hybrid, layers of other mixers have no bound and do not count.

Departures: initialisation N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/OpenNLPLab/HGRN2
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Size
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.gated_linear_attention.api import gated_linear_attention

# log lb and log(1 - lb), float32: [L, D] of all layers, [D] of one.
Bounds = tuple[jax.Array, jax.Array]


class LowerBounds(nnx.Module):
    """log lb and log(1 - lb) of all layers, [L, D] each.

    Both are sums of softmax entries, so that neither cancels."""

    def __init__(self, width: int, *, layers: int):
        # float32 whatever param_dtype is: it enters an exponential.
        gamma_LD = jnp.zeros((layers, width), jnp.float32)
        self.gamma_LD = nnx.Param(gamma_LD, group="no_decay", out_sharding=(None, "heads"))

    def __call__(self) -> Bounds:
        # Rows 1, ..., L - 1, 0: bound l is the sum of the first l of them, the rest that of the
        # others.
        p_log_LD = jnp.roll(jax.nn.log_softmax(self.gamma_LD[...], axis=0), -1, axis=0)
        # The first layer exactly: lb = 0.
        zero_1D = jnp.zeros_like(p_log_LD[:1])
        bound_log_LD = jax.lax.cumlogsumexp(p_log_LD[:-1], axis=0)
        rest_log_LD = jax.lax.cumlogsumexp(p_log_LD[1:], axis=0, reverse=True)
        return (
            jnp.concatenate((jnp.full_like(zero_1D, -jnp.inf), bound_log_LD)),
            jnp.concatenate((zero_1D, rest_log_LD)),
        )


class HGRN2(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V]}, float32.

    `shared` is this layer's slice of what `LowerBounds` computes; without it lb = 0, as in a
    network's first layer."""

    causal = True

    Shared = LowerBounds

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 4,
        norm_eps: Epsilon = 1e-5,
    ):
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.compute_dtype, self.head_size = (
            heads,
            compute_dtype,
            head_size(width, heads),
        )

        self.query = dense(width, width, ("embed", "heads"))
        self.forget = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.norm = rms_norm(width, eps=norm_eps, axis="heads", rngs=rngs, param_dtype=param_dtype)
        self.output = dense(width, width, ("heads", "embed"), init=residual_normal(depth))

    def gate(self, logit_BTD: jax.Array, bounds: Bounds | None) -> tuple[jax.Array, jax.Array]:
        """log f and 1 - f for logits x W_f, float32."""
        f_log_BTD = jax.nn.log_sigmoid(logit_BTD)
        k_log_BTD = jax.nn.log_sigmoid(-logit_BTD)
        if bounds is not None:
            bound_log_BTD, rest_log_BTD = (log_D[None, None, :] for log_D in bounds)
            f_log_BTD = jnp.logaddexp(bound_log_BTD, rest_log_BTD + f_log_BTD)
            k_log_BTD = rest_log_BTD + k_log_BTD
        # f <= 1; only the rounding of the sum can put its logarithm above 0.
        return jnp.minimum(f_log_BTD, 0.0), jnp.exp(k_log_BTD)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
        shared: Bounds | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        state = state or {}
        decay_log_BTD, k_BTD = self.gate(self.forget(x_BTD).astype(jnp.float32), shared)
        o_BTHV, memory = gated_linear_attention(
            split_heads(jax.nn.silu(self.query(x_BTD)), self.heads),
            split_heads(k_BTD, self.heads),
            split_heads(self.value(x_BTD), self.heads),
            split_heads(decay_log_BTD, self.heads),
            scale=1.0,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        return self.output(self.norm(merge_heads(o_BTHV)).astype(self.compute_dtype)), {
            "memory": memory
        }

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            "memory": jnp.zeros((batch, self.heads, self.head_size, self.head_size), jnp.float32)
        }


Mixer = HGRN2
