"""LION. Liu, Hou, Wang, Ye, Wang, Wang, Bai et al., "LION: Linear Group RNN for 3D Object Detection
in Point Clouds", NeurIPS 2024.

A linear recurrence reads sparse voxels that are sorted by windows and cut into long groups of equal
size: thousands of voxels see each other at a cost that is linear in their number.

    layer       x <- f_y(f_x(x)): an operator within the groups of the order along x, then one along
                y, each a residual block                                      orders.py
    block       twice [positions + layer, keep, descriptor, merge 2 x 2 x 2], then twice
                [layer, expand + kept, norm]; the second layer of each pair has shifted windows
    descriptor  gelu(norm(submanifold convolution(x))), the place that sorting loses
                                                                              submanifold.py
    between     descriptor, voxels are generated, merge 1 x 1 x 2, norm      voxels.py

`Mixer`, which this file has, is the operator of the released code in two forms:

    "retnet"    o_t = q_t S_t / sqrt(K),  S_t = gamma_h S_{t-1} + k_t^T v_t,  y = o W_o
                gamma_h = 1 - 2^(-5 - h); no rotation, no gate, no norm: RetNet's recurrence alone
    "mamba"     [x, z] = u W_in,  y = (s(x) + flip(s'(flip(x)))) W_out,  s a convolution and a
                selective scan, gated by silu(z), with weights of its own for each direction

and any other causal mixer takes its place: an operator is a pattern of mixers as elsewhere. The
blocks are models/blocks/voxel_block.py, the whole model models/networks/point_cloud.py. Around
"retnet" are pre-norms and an MLP of 4 C, around "mamba" x + norm(f(x)) alone (`branch_norm`).

    q, k    q_BTHK, k_BTHK      heads * K = C;  v_BTHV with V = 2 K
    S       "memory" [B,H,K,V]  float32; of "mamba" none, it reads both ways

State: 2 C^2 / H floats. Cost per voxel: O(C^2 / H), or of "mamba" O(E N), E = expand C.

Departures: the last group of a cloud is shorter than the others, instead of being filled up with
copies of voxels, which an operator that reads both ways sees; `fill_groups` of the network does as
the released code does. A coarse grid has ceil(size / stride) cells; the released code has floor,
so that cells of two places can get the same number.

Authors' code: https://github.com/happinesslz/LION
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.mamba import Mamba
from models.parts.options import Count, Factor, Size, check_choice
from models.parts.projections import FAN_IN_UNIFORM, head_size, merge_heads, projection, split_heads
from models.parts.short_convolution import ConvWidth
from models.retnet import decay_log
from ops.gated_linear_attention.api import gated_linear_attention

OPERATORS = ("retnet", "mamba")


class PlainRetention(nnx.Module):
    """x_BTD -> y_BTD; the state is {"memory" [B,H,K,V]}, float32."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        expand_v: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        dense = functools.partial(
            projection,
            init=FAN_IN_UNIFORM,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
        )
        self.heads, self.compute_dtype = heads, compute_dtype
        self.key_size = head_size(width, heads)
        self.value_size = head_size(width, heads, expand_v)
        self.query = dense(width, width, ("embed", "heads"))
        self.key = dense(width, width, ("embed", "heads"))
        self.value = dense(width, heads * self.value_size, ("embed", "heads"))
        self.output = dense(heads * self.value_size, width, ("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, state: dict[str, Any] | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        q_BTHK, k_BTHK, v_BTHV = (
            split_heads(linear(x_BTD), self.heads) for linear in (self.query, self.key, self.value)
        )
        state = state or self.init_state(len(x_BTD))
        o_BTHV, memory = gated_linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            decay_log(self.heads),
            initial_state=state["memory"],
            segment_ids=segment_ids,
        )
        return self.output(merge_heads(o_BTHV).astype(self.compute_dtype)), {"memory": memory}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        shape = (batch, self.heads, self.key_size, self.value_size)
        return {"memory": jnp.zeros(shape, jnp.float32)}


class TwoWayMamba(nnx.Module):
    """x_BTD -> y_BTD; there is no state. `forward` has the maps into and out of both directions."""

    def __init__(self, width: int, *, depth: int, **given: Any):
        self.forward, self.backward = (Mamba(width, depth=depth, **given) for _ in range(2))
        for shared in ("input", "gate", "output"):
            delattr(self.backward, shared)

    def __call__(
        self, x_BTD: jax.Array, state: None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, None]:
        x_BTE, z_BTE = self.forward.input(x_BTD), self.forward.gate(x_BTD)
        there_BTE, _ = self.forward.scan(x_BTE, z_BTE, segment_ids=segment_ids)
        back_BTE, _ = self.backward.scan(x_BTE, z_BTE, segment_ids=segment_ids, reverse=True)
        return self.forward.output(there_BTE + back_BTE), None


class LionOperator(nnx.Module):
    """x_BTD -> y_BTD; the state is that of the operator, None for "mamba".

    operator                                "retnet" or "mamba"
    heads, expand_v                         of "retnet"
    expand, state_size, dt_rank, conv_width of "mamba", as in models/mamba.py

    Raises ValueError for an option of the other operator that is not its default."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        operator: str = "retnet",
        heads: Size = 2,
        expand_v: Factor = 2.0,
        expand: Factor = 2.0,
        state_size: Size = 16,
        dt_rank: Count = 0,
        conv_width: ConvWidth = 4,
    ):
        check_choice("operator", operator, OPERATORS)
        of_other = (
            {"expand": expand, "state_size": state_size}
            | {"dt_rank": dt_rank, "conv_width": conv_width}
            if operator == "retnet"
            else {"heads": heads, "expand_v": expand_v}
        )
        options = inspect.signature(LionOperator.__init__).parameters
        for name, value in of_other.items():
            if value != (default := options[name].default):
                raise ValueError(
                    f"{name} is not for operator={operator!r} and must be {default}; got {value}"
                )
        given: dict[str, Any] = {
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        self.causal = operator == "retnet"
        self.operator: Any
        if self.causal:
            self.operator = PlainRetention(width, heads=heads, expand_v=expand_v, **given)
        else:
            self.operator = TwoWayMamba(
                width,
                depth=1,  # W_out as in a layer by itself
                expand=expand,
                state_size=state_size,
                dt_rank=dt_rank,
                conv_width=conv_width,
                **given,
            )

    def __call__(
        self,
        x_BTD: jax.Array,
        state: Any = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        return self.operator(x_BTD, state, segment_ids)

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros. Raises ValueError for "mamba"."""
        if not self.causal:
            raise ValueError("lion with operator='mamba' has no state: a token reads later ones")
        return self.operator.init_state(batch)


Mixer = LionOperator
