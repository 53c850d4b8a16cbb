"""mmMamba: Mamba-2 seeded with the weights of softmax attention, which it first mimics. Liao, Tao,
Zhang, Cheng, Li, Yin, Liu, Wang, "Multimodal Mamba: Decoder-only Multimodal State Space Model via
Quadratic to Linear Distillation", 2025, arXiv 2502.13145.

    v, k, q = silu(conv([x W_v, x W_k, x W_q]) + b_conv)     W of the attention that it replaces
    Delta_t = softplus(x_t W_Delta + b_Delta),   gamma_t = exp(-Delta_t exp(a))      per head
    S_t = gamma_t S_{t-1} + Delta_t k_t^T v_t,   o_t = q_t S_t
    y_t = (norm(o_t) * silu(x_t W_g)) W_o,       norm per head

    q, k, v     q_BTHK, k_BTHK, v_BTHV      no rotation; keys and values of grouped heads are
                                            repeated after the convolution over two tokens
    Delta       dt_BTH                      float32
    a, b_Delta  a_log_H, dt_bias_H
    S           "memory" [B,H,K,V]          float32

start="mimic": softplus(b_Delta) is log-uniform on [1e-3, 0.1], W_Delta is 0 and a is 1, so that
little is forgotten; the convolution is the identity. "default", the paper's ablation: exp(a) from
U(1, 16), b_Delta 0, W_Delta and the convolution at random. input_scale=False has k_t^T v_t without
Delta_t, as the paper's text has it and its code has not.

stage="new" and stage="all" are the first two of three (experiments/configs/mm_mamba.py): the layer
gives on what softmax attention over `context_length` tokens gives, so that each layer trains on the
teacher's inputs, and reports 1000 times the mean square of the difference of the two o as its loss.
In "new" no gradient reaches W_q, W_k and W_v, which are the teacher's, too; in "all" the teacher
has copies, `teacher`. stage="student" is the layer itself. Parameters have the names of
models/transformer.py beside the new ones.

State: H K V floats, and the last inputs of the convolutions. Cost per token: O(H K V).

Departures: a norm of queries and keys is the teacher's alone, as its rotation is; biases stay.

Authors' code: https://github.com/hustvl/mmMamba"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.discretisation import dt_bias
from models.parts.norms import rms_norm
from models.parts.options import Count, Epsilon, Reach, Size, check_choice
from models.parts.positions import next_position, token_positions
from models.parts.projections import XAVIER_SMALL, ZEROS, merge_heads, projection, split_heads
from models.parts.rotary import RopeBase
from models.parts.short_convolution import ShortConvolution
from models.parts.variables import AUXILIARY_LOSS, TRANSFER_ERROR, report
from models.window_attention import WindowAttention
from ops.gated_linear_attention.api import gated_linear_attention
from ops.window_attention.api import init_window_state, pad_window_state, window_attention

STAGES = ("new", "all", "student")
STARTS = ("mimic", "default")
TAPS = 2
DT_MIN, DT_MAX = 1e-3, 0.1
MIMIC_WEIGHT = 1000.0
PROJECTIONS = ("query", "key", "value")


class MultimodalMamba(WindowAttention):
    """x_BTD -> y_BTD; the state is {"conv_q", "conv_k", "conv_v", "memory" [B,H,K,V], "position"},
    and "teacher", the `WindowState` of softmax attention, in the first two stages."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        stage: str = "student",
        start: str = "mimic",
        input_scale: bool = True,
        context_length: Reach = 1024,
        heads: Size = 4,
        key_value_heads: Count = 0,
        rope: bool = True,
        rope_base: RopeBase = 10000.0,
        qk_norm: bool = False,
        norm_eps: Epsilon = 1e-5,
        size_per_head: Count = 0,
        rope_scaling: tuple[Any, ...] = (),
        qkv_bias: bool = False,
        output_bias: bool = False,
        rotary_size: Count = 0,
        zero_centred_norm: bool = False,
        whole_norm: bool = False,
    ):
        check_choice("stage", stage, STAGES)
        check_choice("start", start, STARTS)
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        attention: dict[str, Any] = {
            "depth": depth,
            "window": context_length,
            "heads": heads,
            "key_value_heads": key_value_heads,
            "rope": rope,
            "rope_base": rope_base,
            "qk_norm": qk_norm,
            "norm_eps": norm_eps,
            "size_per_head": size_per_head,
            "rope_scaling": rope_scaling,
            "qkv_bias": qkv_bias,
            "output_bias": output_bias,
            "rotary_size": rotary_size,
            "zero_centred_norm": zero_centred_norm,
            "whole_norm": whole_norm,
        }
        super().__init__(width, rngs=rngs, **attention, **dtypes)
        self.stage, self.input_scale = stage, input_scale
        self.teacher = (
            WindowAttention(width, rngs=rngs, **attention, **dtypes) if stage == "all" else None
        )
        self.add_recurrence(width, start == "mimic", norm_eps, rngs=rngs, **dtypes)

    def add_recurrence(
        self,
        width: int,
        mimics: bool,
        norm_eps: float,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ) -> None:
        """Makes what softmax attention has not."""
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        heads, size = self.heads, self.head_size

        def convolution(heads: int) -> ShortConvolution:
            made = ShortConvolution(heads * size, TAPS, bias=True, rngs=rngs, **dtypes)
            if mimics and made.weight_WD is not None and made.bias_D is not None:
                made.weight_WD[...] = jnp.zeros_like(made.weight_WD[...]).at[-1].set(1)
                made.bias_D[...] = jnp.zeros_like(made.bias_D[...])
            return made

        self.conv_q, self.conv_k, self.conv_v = (
            convolution(n) for n in (heads, self.key_value_heads, self.key_value_heads)
        )
        dense = functools.partial(projection, width, rngs=rngs, **dtypes)
        self.dt = dense(heads, ("embed", "heads"), init=ZEROS if mimics else XAVIER_SMALL)
        self.gate = dense(heads * size, ("embed", "heads"), init=XAVIER_SMALL)
        self.norm = rms_norm(size, eps=norm_eps, rngs=rngs, param_dtype=param_dtype)
        # float32 whatever param_dtype is: they enter exponentials.
        bias_H, a_log_H = jnp.zeros((heads,)), jnp.ones((heads,), jnp.float32)
        if mimics:
            bias_H = dt_bias(rngs.params(), heads, DT_MIN, DT_MAX)
        else:
            a_log_H = jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16))
        self.dt_bias_H = nnx.Param(bias_H, group="no_decay", out_sharding=("heads",))
        self.a_log_H = nnx.Param(a_log_H, group="no_decay", out_sharding=("heads",))

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
        o_BTHV, after = self.recurrent(x_BTD, state, segment_ids)
        after["position"] = next_position(positions_BT)
        if self.stage != "student":
            taught_BTHV, after["teacher"] = self.taught(
                x_BTD, positions_BT, state["teacher"], segment_ids
            )
            error = jnp.mean(jnp.square(o_BTHV - taught_BTHV.astype(jnp.float32)))
            report(self, **{AUXILIARY_LOSS: MIMIC_WEIGHT * error, TRANSFER_ERROR: error})
            o_BTHV = taught_BTHV
        return self.output(merge_heads(o_BTHV).astype(self.compute_dtype)), after

    def recurrent(
        self, x_BTD: jax.Array, state: dict[str, Any], segment_ids: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The gated o, float32, and the state after the last token without its position."""
        inputs = {name[0]: getattr(self, name)(x_BTD) for name in PROJECTIONS}
        if self.stage == "new":
            inputs = jax.lax.stop_gradient(inputs)
        heads = {"q": self.heads, "k": self.key_value_heads, "v": self.key_value_heads}
        after: dict[str, Any] = {}
        made: dict[str, jax.Array] = {}
        for letter, given in inputs.items():
            name = f"conv_{letter}"
            mixed, after[name] = getattr(self, name)(given, state[name], segment_ids)
            made[letter] = split_heads(jax.nn.silu(mixed).astype(jnp.float32), heads[letter])
        dt_BTH = jax.nn.softplus(
            self.dt(x_BTD).astype(jnp.float32) + self.dt_bias_H[...][None, None]
        )
        v_BTHV = self.per_query_head(made["v"])
        o_BTHV, after["memory"] = gated_linear_attention(
            made["q"],
            self.per_query_head(made["k"]),
            dt_BTH[..., None] * v_BTHV if self.input_scale else v_BTHV,
            -jnp.exp(self.a_log_H[...])[None, None] * dt_BTH,
            scale=1.0,
            initial_state=state["memory"],
            segment_ids=segment_ids,
        )
        gate_BTHV = split_heads(jax.nn.silu(self.gate(x_BTD)).astype(jnp.float32), self.heads)
        return self.norm(o_BTHV) * gate_BTHV, after

    def taught(
        self, x_BTD: jax.Array, positions_BT: jax.Array, state: Any, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """o of softmax attention, of which nothing learns, and its state after the last token."""
        source = self if self.teacher is None else self.teacher
        q_BTHK, k_BTHK, v_BTHV = jax.lax.stop_gradient(source.projected(x_BTD))
        o_BTHV, window = window_attention(
            self.rotated(q_BTHK, positions_BT).astype(self.compute_dtype),
            self.rotated(k_BTHK, positions_BT).astype(self.compute_dtype),
            v_BTHV,
            window=self.window,
            initial_state=state,
            segment_ids=segment_ids,
        )
        return o_BTHV, pad_window_state(window, self.window)

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        size = self.head_size
        found: dict[str, Any] = {
            name: getattr(self, name).init_state(batch) for name in ("conv_q", "conv_k", "conv_v")
        }
        found["memory"] = jnp.zeros((batch, self.heads, size, size), jnp.float32)
        found["position"] = jnp.zeros((batch,), jnp.int32)
        if self.stage != "student":
            found["teacher"] = init_window_state(
                batch, self.window, self.key_value_heads, size, size, self.compute_dtype
            )
        return found


Mixer = MultimodalMamba
