"""DiagAttention, the lower half of TransNormer. Qin, Han, Sun, Li, Kong, Barnes, Zhong, "The Devil
in Linear Transformer", EMNLP 2022, arXiv 2210.10340. The upper half is `transnormer`.

    o_t = sum_s p_ts v_s,    p_t = softmax_s(q_t k_s / sqrt(K))    over s <= t in the block of t
                             over all s in the block of t with causal=False; then also
    o = norm(sum_s relu(q_t k_s / sqrt(K)) v_s)         of attention="relu" (T1), norm as in
                                                        `transnormer`, over all heads
    q_t, k_s = x W_{q,k} turned by position * theta,    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK      heads * K = d
    v       v_BTHV              heads * K = d
    block   positions block * n .. block * (n + 1) - 1 of a document
    theta   rotation.theta_K    [K/2], learned, starts at 10000^(-2i/K)

Attention is on the diagonal blocks of the score matrix alone: near tokens are compared exactly, and
no weight is spread thinly over a long past. With causal=True a block is a segment of the window
attention op.

State, none with causal=False: the keys and values of the block so far, at most 2 (block - 1) d
numbers of the compute dtype. Cost per token: O(block d).

T2 (softmax) is the paper's choice for autoregressive models, T1 for bidirectional ones. The
projections of q, k and v start Xavier-uniform with gain 2^-0.5, as in the paper; W_o as N(0, 0.02^2
/ (2 depth)).

Authors' code: https://github.com/OpenNLPLab/Transnormer
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.bidirectional import no_state
from models.parts.norms import simple_rms_norm
from models.parts.options import Reach, Size, check_choice
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
from ops.neighbourhood_attention.api import neighbourhood_attention
from ops.shifted_window_attention.api import shifted_window_attention
from ops.window_attention.api import init_window_state, window_attention

NORM_EPS = 1e-6  # of transnormer, too


class DiagAttention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"window": WindowState, "position" [B] int32}, and None with
    causal=False.

    "window" holds past values and rotated keys; "position" is where the next token stands when
    `positions` is not given."""

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
        attention: str = "softmax",
        causal: bool = True,
    ):
        check_choice("attention", attention, ("softmax", "relu"))
        if causal and attention == "relu":
            raise ValueError("attention='relu' is of bidirectional models: it needs causal=False")
        if block < 1:
            raise ValueError(f"block must be at least 1 (the token itself); got {block}")
        dense = functools.partial(
            projection, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype
        )
        self.heads, self.block, self.compute_dtype = (heads, block, jnp.dtype(compute_dtype))
        self.head_size, self.attention, self.causal = head_size(width, heads), attention, causal

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
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        batch, length, _ = x_BTD.shape
        state = state or self._first_state(batch)
        aligned = positions is None and segment_ids is None
        positions_BT = token_positions(positions, state["position"], length, segment_ids)
        starts_BT = positions_BT % self.block == 0
        # A state from before a block that starts with this call's first token is not seen any more.
        window = state["window"]
        window = window._replace(valid=window.valid & ~starts_BT[:, :1])
        if segment_ids is not None:
            starts_BT |= segments.starts(segment_ids)
        block_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        qkv = (
            self.rotation(split_heads(self.query(x_BTD), self.heads), positions_BT),
            self.rotation(split_heads(self.key(x_BTD), self.heads), positions_BT),
            split_heads(self.value(x_BTD), self.heads),
        )
        if not self.causal:
            o_BTHV = self.attend_both_ways(qkv, mask, None if aligned else block_BT)
            o_BTD = merge_heads(o_BTHV)
            if self.attention == "relu":
                o_BTD = simple_rms_norm(o_BTD, NORM_EPS).astype(self.compute_dtype)
            return self.output(o_BTD), None
        o_BTHV, window = window_attention(
            *qkv, window=self.block, initial_state=window, segment_ids=block_BT
        )
        y_BTD = self.output(merge_heads(o_BTHV))
        return y_BTD, {"window": window, "position": next_position(positions_BT)}

    def attend_both_ways(
        self,
        qkv: tuple[jax.Array, jax.Array, jax.Array],
        mask_BT: jax.Array | None,
        block_BT: jax.Array | None,
    ) -> jax.Array:
        """Attention [B, T, H, V] within blocks: those of `block_BT`, numbers that never fall, or
        None for blocks that start at multiples of their size."""
        batch, length = qkv[0].shape[:2]
        if self.attention == "softmax" and block_BT is not None:
            # No token of a block is as far as the size of a block from another.
            return neighbourhood_attention(
                *qkv, grid=(length,), radius=self.block, key_mask=mask_BT, segment_ids=block_BT
            )
        # Whole blocks, of which the last may have padding.
        size = min(self.block, length)
        behind = -length % size
        there_BT = jnp.ones((batch, length), bool) if mask_BT is None else mask_BT
        q, k, v, there_BT = (
            jnp.pad(x, ((0, 0), (0, behind)) + ((0, 0),) * (x.ndim - 2)) for x in (*qkv, there_BT)
        )
        if self.attention == "softmax":
            o_BTHV = shifted_window_attention(
                q, k, v, grid=there_BT.shape[1:], window=(size,), key_mask=there_BT
            )
            return o_BTHV[:, :length]
        return relu_attention(q, k, v, there_BT, block_BT, size)[:, :length]

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: an empty window at position 0. ValueError with
        causal=False."""
        if not self.causal:
            raise no_state("diag_attention")
        return self._first_state(batch)

    def _first_state(self, batch: int) -> dict[str, Any]:
        window = init_window_state(
            batch, self.block, self.heads, self.head_size, self.head_size, self.compute_dtype
        )
        return {"window": window, "position": jnp.zeros((batch,), jnp.int32)}


def relu_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    there_BT: jax.Array,
    block_BT: jax.Array | None,
    size: int,
) -> jax.Array:
    """sum_s relu(q_t k_s / sqrt(K)) v_s over the tokens that are there in the block of t, float32.

    T is a multiple of `size`, the most tokens of a block. block_BT, which may be shorter, has the
    numbers of blocks; None: they start at multiples of their size."""
    tiles = q_BTHK.shape[1] // size
    number_BT = jnp.arange(tiles * size)[None] // size
    if block_BT is not None:
        number_BT = jnp.pad(block_BT, ((0, 0), (0, tiles * size - block_BT.shape[1])))
    number_BT = jnp.broadcast_to(number_BT, there_BT.shape)

    def tiled(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(len(x), tiles, size, *x.shape[2:])

    def near(x: jax.Array) -> jax.Array:
        """The tile and, where a block may begin in another, the tiles on both sides."""
        x = tiled(x)
        if block_BT is None:
            return x
        apart = jnp.pad(x, ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([apart[:, :-2], x, apart[:, 2:]], axis=2)

    seen = tiled(number_BT)[..., :, None] == near(number_BT)[..., None, :]
    seen &= near(there_BT)[..., None, :] > 0
    score = jnp.einsum("bgthk,bgshk->bghts", tiled(q_BTHK), near(k_BTHK))
    score = jax.nn.relu(score / q_BTHK.shape[-1] ** 0.5)
    o = jnp.einsum("bghts,bgshv->bgthv", jnp.where(seen[:, :, None], score, 0.0), near(v_BTHV))
    return o.reshape(v_BTHV.shape)


Mixer = DiagAttention
