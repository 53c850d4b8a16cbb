"""DeltaNet. Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule
over Sequence Length", NeurIPS 2024, arXiv 2406.06484; the recurrence is from Schlag, Irie,
Schmidhuber, ICML 2021, arXiv 2102.11174. With eigenvalue_range=(-1, 1): Grazzi, Siems, Zela,
Franke, Hutter, Pontil, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", ICLR
2025, arXiv 2411.12537.

    S_t = (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,    o_t = q_t S_t / sqrt(K)
    q, k = l2norm(silu(conv(x W_{q,k}))),    v = silu(conv(x W_v)),    beta = sigmoid(x W_beta)
    y_t = norm(o_t) W_o,    norm per head

    q, k    q_BTHK, k_BTHK      unit norm per head: x / sqrt(sum x^2 + 1e-6), in float32
    v       v_BTHV
    beta    beta_BTH            in (0, 1); with eigenvalue_range=(-1, 1) twice that, in (0, 2)
    S       "memory" [B,H,K,V]  float32

The transition has K - 1 eigenvalues 1 and one eigenvalue 1 - beta_t: in (0, 1), or in (-1, 1),
which parity and group word problems need.

State: H K V floats, and 3 (W - 1) d for the convolutions. Cost per token: O(H K V).

Departures: none known; `conv_width=0` is the paper's "without convolution" (SiLU stays).
Initialisation: Xavier-uniform with gain 2^-2.5.

Authors' code: https://github.com/fla-org/flash-linear-attention,
https://github.com/automl/unlocking_state_tracking
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.convolved_projections import ConvolvedProjections
from models.parts.norms import l2_normalise, rms_norm
from models.parts.options import Epsilon, Factor, Size, check_choice
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from ops.delta_rule.api import delta_rule


class DeltaNet(ConvolvedProjections):
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
        eigenvalue_range: tuple[int, int] = (0, 1),
        norm_eps: Epsilon = 1e-5,
    ):
        check_choice("eigenvalue_range", tuple(eigenvalue_range), ((0, 1), (-1, 1)))
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.compute_dtype = heads, compute_dtype
        self.beta_max = 1 - min(eigenvalue_range)  # the moving eigenvalue is 1 - beta
        self.key_size = head_size(width, heads, expand_k)
        self.value_size = head_size(width, heads, expand_v)
        key_width, value_width = heads * self.key_size, heads * self.value_size

        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, value_width, ("embed", "heads"))
        self.beta = dense(width, heads, ("embed", "heads"))
        self.add_convolutions(key_width, value_width, conv_width, rngs=rngs, **dtypes)
        self.norm = rms_norm(self.value_size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
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
        o_BTHV, memory = delta_rule(
            q_BTHK.astype(self.compute_dtype),
            k_BTHK.astype(self.compute_dtype),
            split_heads(jax.nn.silu(v_BTD), self.heads),
            self.beta_max * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32)),
            initial_state=state.get("memory"),
            segment_ids=segment_ids,
            reverse=reverse,
        )
        y_BTD = self.output(merge_heads(self.norm(o_BTHV)).astype(self.compute_dtype))
        return y_BTD, {**convolutions, "memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {
            **self.init_convolutions(batch),
            "memory": jnp.zeros((batch, self.heads, self.key_size, self.value_size), jnp.float32),
        }


Mixer = DeltaNet
