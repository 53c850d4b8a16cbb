"""ViG. Liao, Wang, Zhu, Huang, "ViG: Linear-complexity Visual Sequence Learning with Gated Linear
Attention", AAAI 2025, arXiv 2405.18425.

    L = depthwise 3 x 3 convolution of x                    over the grid of tokens
    q, k, v = L W_q, L W_k, L W_v                           shared by both directions
    [uF, uB] = L W_1 W_2 + b,   alpha = sigmoid(u)^(1/16)   direction-wise gates
    SF_i = diag(alphaF_i) SF_{i-1} + k_i^T v_i              oF_i = q_i SF_i / sqrt(K)
    SB_i = diag(alphaB_i) SB_{i+1} + k_i^T v_i              oB_i = q_i SB_i / sqrt(K)
    o = (oF + oB) / 2
    g = sigmoid(L W_g + b_g)                                locality injection
    y = (g * norm(o) + (1 - g) * norm(L)) W_o

    q, k    q_BTHK, k_BTHK    K = expand_k * width / H
    v, L    v_BTHV, l_BTD     V = width / H
    u       logit_BTG         G = 2 H K: forwards, then backwards; heads slowest
    norm                      RMSNorm of a head, two of them, each with a scale [V] for all heads

A token's own k_i^T v_i is in both sums, undecayed. Not causal, so there is no state; cost per
token: O(H K V), forwards and backwards. Segments stay apart in the walks and in the convolution;
without a grid the tokens are a line.

Sizes of the paper: T width 192, S 384, B 768, all of depth 12 with heads of 64; hierarchical T, S
and B of four stages with heads of 32. The smallest, T, has SiLU behind the convolution and before
W_o.

Ablations of the paper: directions="forward" (one walk); gates="shared" (one gate for both);
kernel_size=0 (no convolution: L = x); blend=False (y = norm(o) W_o). gates="none" is linear
attention without decay.

Departures: none in the equations; the walks are two calls of one op, not one loop with two states.

Authors' code: https://github.com/hustvl/ViG
"""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.grid_convolution import grid_convolution
from models.parts.norms import rms_norm
from models.parts.options import Epsilon, Factor, Range, Size, check_choice
from models.parts.projections import XAVIER_SMALL, head_size, merge_heads, projection, split_heads
from ops.gated_linear_attention.api import gated_linear_attention

KernelSize = Annotated[int, Range(0, 31)]
ACTIVATIONS = {"none": lambda x: x, "silu": jax.nn.silu}


class ViGMixer(nnx.Module):
    """x_BTD -> y_BTD; there is no state."""

    causal = False

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        size_per_head: Size = 64,
        expand_k: Factor = 0.5,
        directions: str = "both",
        gates: str = "direction_wise",
        gate_rank: Size = 16,
        gate_temperature: Factor = 16.0,
        kernel_size: KernelSize = 3,
        blend: bool = True,
        convolution_activation: str = "none",
        output_activation: str = "none",
        norm_eps: Epsilon = 1e-6,
    ):
        check_choice("directions", directions, ("both", "forward"))
        check_choice("gates", gates, ("direction_wise", "shared", "none"))
        check_choice("convolution_activation", convolution_activation, tuple(ACTIVATIONS))
        check_choice("output_activation", output_activation, tuple(ACTIVATIONS))
        if kernel_size % 2 == 0 and kernel_size:
            raise ValueError(f"kernel_size must be odd, or 0 for none; got {kernel_size}")
        if width % size_per_head:
            raise ValueError(f"size_per_head must divide the width {width}; got {size_per_head}")
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        dense = functools.partial(projection, init=XAVIER_SMALL, rngs=rngs, **dtypes)
        self.heads, self.compute_dtype = width // size_per_head, compute_dtype
        self.directions, self.gates, self.gate_temperature = directions, gates, gate_temperature
        self.activations = (convolution_activation, output_activation)
        key_width = self.heads * head_size(width, self.heads, expand_k)

        self.weight_YXD = (
            nnx.Param(
                _xavier_small_filters(
                    rngs.params(), (kernel_size, kernel_size, width), param_dtype
                ),
                out_sharding=(None, None, "embed"),
            )
            if kernel_size
            else None
        )
        self.query = dense(width, key_width, ("embed", "heads"))
        self.key = dense(width, key_width, ("embed", "heads"))
        self.value = dense(width, width, ("embed", "heads"))
        own_gates = 2 if gates == "direction_wise" and directions == "both" else 1
        gated = gates != "none"
        self.gate_in = dense(width, gate_rank, ("embed", None)) if gated else None
        gate_out = functools.partial(dense, gate_rank, own_gates * key_width, (None, "heads"))
        self.gate_out = gate_out(bias=True) if gated else None
        norm = functools.partial(
            rms_norm, size_per_head, eps=norm_eps, rngs=rngs, param_dtype=param_dtype
        )
        self.norm = norm()
        self.local_norm = norm() if blend else None
        blending = functools.partial(dense, width, width, ("embed", "heads"), bias=True)
        self.blend = blending() if blend else None
        self.output = dense(width, width, ("heads", "embed"))

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> tuple[jax.Array, None]:
        l_BTD = x_BTD
        if self.weight_YXD is not None:
            l_BTD = grid_convolution(x_BTD, self.weight_YXD[...], grid, segment_ids)
            l_BTD = ACTIVATIONS[self.activations[0]](l_BTD)
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(dense(l_BTD), self.heads) for dense in (self.query, self.key, self.value)
        )
        o_BTHV = self.walks(q_BTHK, k_BTHK, v_BTHV, self.decays(l_BTD), segment_ids)
        y_BTHV = self.norm(o_BTHV)
        if self.blend is not None and self.local_norm is not None:
            g_BTHV = split_heads(jax.nn.sigmoid(self.blend(l_BTD).astype(jnp.float32)), self.heads)
            local_BTHV = self.local_norm(split_heads(l_BTD, self.heads))
            y_BTHV = g_BTHV * y_BTHV + (1 - g_BTHV) * local_BTHV
        y_BTD = ACTIVATIONS[self.activations[1]](merge_heads(y_BTHV))
        return self.output(y_BTD.astype(self.compute_dtype)), None

    def decays(self, l_BTD: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Log decays [B, T, H, K] float32, forwards and backwards."""
        if self.gate_in is None or self.gate_out is None:
            return None, None
        logit_BTG = self.gate_out(self.gate_in(l_BTD)).astype(jnp.float32)
        decay_log_BTG = jax.nn.log_sigmoid(logit_BTG) / self.gate_temperature
        pieces = 2 if self.gates == "direction_wise" and self.directions == "both" else 1
        both = [split_heads(piece, self.heads) for piece in jnp.split(decay_log_BTG, pieces, -1)]
        return both[0], both[-1]

    def walks(
        self,
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        decays: tuple[jax.Array | None, jax.Array | None],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """o_BTHV: the mean of the two directions, or the first."""
        forward, _ = gated_linear_attention(
            q_BTHK, k_BTHK, v_BTHV, decays[0], segment_ids=segment_ids
        )
        if self.directions == "forward":
            return forward
        backward, _ = gated_linear_attention(
            q_BTHK, k_BTHK, v_BTHV, decays[1], segment_ids=segment_ids, reverse=True
        )
        return (forward + backward) / 2


def _xavier_small_filters(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Filters [Y, X, D] as `XAVIER_SMALL` of PyTorch's depthwise weights [D, 1, Y, X]: fan_in is
    Y X and fan_out D Y X."""
    rows, columns, width = shape
    bound = 2**-2.5 * (6 / (rows * columns * (1 + width))) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


Mixer = ViGMixer
