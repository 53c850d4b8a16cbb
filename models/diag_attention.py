"""DiagAttention, the lower half of TransNormer. Qin, Han, Sun, Li, Kong, Barnes, Zhong, "The Devil
in Linear Transformer", EMNLP 2022, arXiv 2210.10340. The upper half is `transnormer`.

    o_t = sum_s p_ts v_s,    p_t = softmax_s(q_t k_s / sqrt(K))    over s <= t in the block of t
    q_t, k_s = x W_{q,k} turned by position * theta,    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK      heads * K = d
    v       v_BTHV              heads * K = d
    block   positions block * n .. block * (n + 1) - 1 of a document
    theta   rotation.theta_K    [K/2], learned, starts at 10000^(-2i/K)

Attention is on the diagonal blocks of the score matrix alone: near tokens are compared exactly, and
no weight is spread thinly over a long past. A block is a segment of the window attention op.

State: the keys and values of the block so far, at most 2 (block - 1) d numbers of the compute
dtype. Cost per token: O(block d).

Departures: this is T2 (softmax), the paper's choice for autoregressive models; T1 (ReLU of the
scores), for bidirectional ones, is left out. The paper starts the projections of q, k and v
Xavier-uniform with gain 2^-0.5; W_o starts as N(0, 0.02^2 / (2 depth)).

Authors' code: https://github.com/OpenNLPLab/Transnormer
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Reach, Size
from models.parts.positions import next_position, token_positions
from models.parts.projections import (
    XAVIER_MEDIUM,
    head_size,
    merge_heads,
    projection,
    residual_normal,
    split_heads,
)
from models.parts.rotary import LearnedRotation
from ops.framework import segments
from ops.window_attention.api import init_window_state, window_attention


class DiagAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"window": WindowState, "position" [B] int32}.

    "window" holds past values and rotated keys; "position" is where the next token stands when
    `positions` is not given."""

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
        block: Reach = 64,
    ):
        if block < 1:
            raise ValueError(f"block must be at least 1 (the token itself); got {block}")
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.block, self.compute_dtype = (heads, block, jnp.dtype(compute_dtype))
        self.head_size = head_size(width, heads)

        self.query = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.key = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.value = dense(width, width, ("embed", "heads"), init=XAVIER_MEDIUM)
        self.rotation = LearnedRotation(self.head_size)
        self.output = dense(width, width, ("heads", "embed"), init=residual_normal(depth))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        batch, length, _ = x_BTD.shape
        state = state or self.init_state(batch)
        positions_BT = token_positions(positions, state["position"], length, segment_ids)
        starts_BT = positions_BT % self.block == 0
        # A state from before a block that starts with this call's first token is not seen any more.
        window = state["window"]
        window = window._replace(valid=window.valid & ~starts_BT[:, :1])
        if segment_ids is not None:
            starts_BT |= segments.starts(segment_ids)
        o_BTHV, window = window_attention(
            self.rotation(split_heads(self.query(x_BTD), self.heads), positions_BT),
            self.rotation(split_heads(self.key(x_BTD), self.heads), positions_BT),
            split_heads(self.value(x_BTD), self.heads),
            window=self.block,
            initial_state=window,
            segment_ids=jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32),
        )
        y_BTD = self.output(merge_heads(o_BTHV))
        return y_BTD, {"window": window, "position": next_position(positions_BT)}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: an empty window at position 0."""
        window = init_window_state(
            batch, self.block, self.heads, self.head_size, self.head_size, self.compute_dtype
        )
        return {"window": window, "position": jnp.zeros((batch,), jnp.int32)}


Mixer = DiagAttention
