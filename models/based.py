"""Based. Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Re, "Simple Linear
Attention Language Models Balance the Recall-Throughput Tradeoff", ICML 2024, arXiv 2402.18668. This
is its linear attention; the sliding window is `window_attention`, beside it in a pattern.

    S_t = S_{t-1} + phi(k_t)^T v_t,    z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) z_t)                                                 (Section 4)
    phi(q) phi(k) = 1 + s + s^2 / 2,    s = q k / sqrt(K)                               (Section 4)
    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK          x W_q, x W_k; K = feature_size = 16 whatever the width is
    v       v_BTHV                  x W_v; heads * V = d
    phi     taylor_features         [..., K] -> [..., 1 + K + K (K + 1) / 2]
    S, z    "memory" [B,H,F,V+1]    float32, F = 153 features; z is the last column

The second-order Taylor series of exp(s) is at least 1/2, so the denominator is at least t/2.

State: H F (V + 1) floats. Cost per token: O(H F V).

Departures: phi holds each product q_i q_j once, weighted by sqrt(2), where the authors' layer holds
it twice (F = 273): the same scores from 0.56 of the state. The short gated convolutions of the
released models are not part. Initialisation: N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/HazyResearch/based
"""

import functools
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.parts.normalised_attention import normalised_attention
from models.parts.options import Range, Size
from models.parts.projections import (
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)

DENOMINATOR_EPS = 1e-12


# Features are about half its square.
FeatureSize = Annotated[int, Range(1, 256)]


def taylor_features(x_BTHK: jax.Array) -> jax.Array:
    """phi with phi(q) phi(k) = 1 + s + s^2/2, s = q k / sqrt(K); float32."""
    size = x_BTHK.shape[-1]
    x_BTHK = x_BTHK.astype(jnp.float32) / size**0.25
    # s^2 / 2 = sum_i (q_i k_i)^2 / 2 + sum_{i < j} (q_i q_j) (k_i k_j)
    first, second = np.triu_indices(size)
    weight_F = np.where(first == second, math.sqrt(0.5), 1.0).astype(np.float32)
    products_BTHF = x_BTHK[..., first] * x_BTHK[..., second] * weight_F[None, None, None, :]
    return jnp.concatenate((jnp.ones_like(x_BTHK[..., :1]), x_BTHK, products_BTHF), axis=-1)


def feature_count(size: int) -> int:
    """Length of `taylor_features` for vectors of `size` channels."""
    return 1 + size + size * (size + 1) // 2


class BasedLinearAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,F,V+1]}, float32."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        heads: Size = 16,
        feature_size: FeatureSize = 16,
    ):
        if feature_size < 1:
            raise ValueError(f"feature_size must be at least 1; got {feature_size}")
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.features, self.compute_dtype = (
            heads,
            feature_count(feature_size),
            compute_dtype,
        )
        self.value_size = head_size(width, heads)

        self.query = dense(width, heads * feature_size, ("embed", "heads"))
        self.key = dense(width, heads * feature_size, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
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
        state = state or {}
        # Section 4
        o_BTHV, memory = normalised_attention(
            taylor_features(split_heads(self.query(x_BTD), self.heads)),
            taylor_features(split_heads(self.key(x_BTD), self.heads)),
            split_heads(self.value(x_BTD), self.heads),
            eps=DENOMINATOR_EPS,
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        return self.output(merge_heads(o_BTHV.astype(self.compute_dtype))), {"memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            "memory": jnp.zeros(
                (batch, self.heads, self.features, self.value_size + 1), jnp.float32
            )
        }


Mixer = BasedLinearAttention
