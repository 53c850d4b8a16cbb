"""LightNet. Qin, Mao, Shen, Li, Zhang, Dai, Zhong, "You Only Scan Once: Efficient Multi-dimension
Sequential Modeling with LightNet", 2024, arXiv 2405.21022.

    z_t = log(exp(z_{t-1}) + exp(k_t)),    w_t = exp(k_t - z_t)
    S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + w_t^T v_t,    o_t = q_t S_t / sqrt(K)
    y_t = (norm(o_t) * swish((x_t W_1) W_2)) W_o,    norm over all heads together

    q, k        q_BTHK, k_BTHK          silu(x W_q), x W_k
    v           v_BTHV                  x W_v
    z           "normaliser_log" [B,HK] float32; the log of the running sum of exp(k)
    S           "memory" [B,H,K,V]      float32

Unrolled, S_t = sum_{s <= t} (exp(k_s) / sum_{r <= t} exp(k_r))^T v_s: a softmax over the past, one
per channel. An old token is never forgotten, only diluted by new ones, and the last state does not
depend on their order. With d = k_t - z_{t-1} the weight is sigmoid(d) and the decay 1 - sigmoid(d),
which is how both are computed: exact sums to 1, however small one of them is.

empty_sum: before the first token the sum is 0 ("zero", the weights add up to 1) or 1 ("one", the
authors' code: a virtual first token with k = 0 and v = 0).

State: d^2 / H + d floats; heads have 128 channels in the authors' layer. Cost per token: O(d^2/H).

Departures: without the paper's encodings MD-TPE and MD-LRPE, which place the tokens of grids; a
text has its order from the recurrence. Gate and norm are those of the library below.
Initialisation: N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/OpenNLPLab/LightNet,
https://github.com/fla-org/flash-linear-attention
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Size, check_choice
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from ops.framework.segments import starts
from ops.gated_linear_attention.api import gated_linear_attention


class LightNetAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V], "normaliser_log" [B,HK]}, float32."""

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
        empty_sum: str = "zero",
        gate_rank: Size = 128,
        norm_eps: Epsilon = 1e-5,
    ):
        check_choice("empty_sum", empty_sum, ("zero", "one"))
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.width, self.compute_dtype = heads, width, compute_dtype
        self.head_size = head_size(width, heads)
        self.empty_log = 0.0 if empty_sum == "one" else -float("inf")

        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        self.norm = rms_norm(width, eps=norm_eps, axis="heads", rngs=rngs, param_dtype=param_dtype)
        self.output_gate_in = dense(width, gate_rank, ("embed", None))
        self.output_gate_out = dense(gate_rank, width, (None, "heads"))
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
        state = state or self.init_state(x_BTD.shape[0])
        k_BTD = self.key(x_BTD).astype(jnp.float32)
        z_BTD, before_BTD = running_normaliser(
            k_BTD,
            empty=self.empty_log,
            initial_BD=state["normaliser_log"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        # A first token after an empty sum has all the weight; there is no state for its decay to
        # act on.
        alone_BTD = jnp.isneginf(before_BTD)
        d_BTD = k_BTD - jnp.where(alone_BTD, 0.0, before_BTD)
        o_BTHV, memory = gated_linear_attention(
            split_heads(jax.nn.silu(self.query(x_BTD)), self.heads),
            split_heads(jnp.where(alone_BTD, 1.0, jax.nn.sigmoid(d_BTD)), self.heads),
            split_heads(self.value(x_BTD), self.heads),
            split_heads(jnp.where(alone_BTD, 0.0, jax.nn.log_sigmoid(-d_BTD)), self.heads),
            initial_state=state["memory"],
            segment_ids=segment_ids,
            reverse=reverse,
        )
        o_BTD = self.norm(merge_heads(o_BTHV)).astype(self.compute_dtype)
        last = 0 if reverse else -1
        gate_BTD = jax.nn.silu(self.output_gate_out(self.output_gate_in(x_BTD)))
        return self.output(o_BTD * gate_BTD), {"memory": memory, "normaliser_log": z_BTD[:, last]}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: a zero matrix and the log of an empty sum."""
        return {
            "memory": jnp.zeros((batch, self.heads, self.head_size, self.head_size), jnp.float32),
            "normaliser_log": jnp.full((batch, self.width), self.empty_log, jnp.float32),
        }


def running_normaliser(
    k_BTD: jax.Array,
    *,
    empty: float,
    initial_BD: jax.Array,
    segment_ids: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """z_t = log(exp(z_{t-1}) + exp(k_t)) per channel and z_{t-1}, both [B, T, D] float32.

    `initial_BD` stands before the first token and `empty`, the log of an empty sum (-inf, or 0 for
    a sum that starts at 1), before the first token of a later segment. In reverse the first token
    is the last of time. Nothing overflows, whatever k is: no exponential of it is formed."""
    k_BTD = k_BTD.astype(jnp.float32)
    if segment_ids is None:
        starts_BT1 = jnp.zeros((*k_BTD.shape[:2], 1), bool)
    else:
        starts_BT1 = starts(segment_ids, reverse=reverse)[..., None]
    own_BTD = jnp.where(starts_BT1, jnp.logaddexp(empty, k_BTD), k_BTD)
    first = -1 if reverse else 0
    own_BTD = own_BTD.at[:, first].set(jnp.logaddexp(initial_BD, k_BTD[:, first]))

    def combine(earlier, later):
        (starts, z), (later_starts, later_z) = earlier, later
        return starts | later_starts, jnp.where(later_starts, later_z, jnp.logaddexp(z, later_z))

    _, z_BTD = lax.associative_scan(combine, (starts_BT1, own_BTD), axis=1, reverse=reverse)
    if reverse:
        before_BTD = jnp.concatenate((z_BTD[:, 1:], initial_BD[:, None]), axis=1)
    else:
        before_BTD = jnp.concatenate((initial_BD[:, None], z_BTD[:, :-1]), axis=1)
    return z_BTD, jnp.where(starts_BT1, empty, before_BTD)


Mixer = LightNetAttention
