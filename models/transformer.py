"""Softmax attention, the baseline. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv
1706.03762, in the pre-norm form with rotary positions of later language models.

    o_t = sum_{s <= t} softmax_s(q_t k_s / sqrt(K)) v_s        (Eq. 1, causal)
    y_t = o_t W_o

    q, k    q_BTHK, k_BTHK      x W_q, x W_k, optionally normalised per head (qk_norm), then
                                rotated (rope)
    v       v_BTHV              x W_v
    T       context_length      tokens that a query sees at most, itself included

Causal attention over at most `context_length` tokens *is* attention with a window of that many, so
this is the mixer of `window_attention.py` under the baseline's name; up to `context_length` tokens
it is full attention, and beyond, the oldest tokens slide out of the state.

State: the key/value cache, 2 (context_length - 1) key_value_heads K numbers of the compute dtype.
Cost per token: O(T d).

Departures: rotary instead of sinusoidal positions, no biases unless asked for. Initialisation:
N(0, 0.02^2); W_o divided by sqrt(2 depth).

Authors' code: https://github.com/tensorflow/tensor2tensor
"""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Count, Epsilon, Reach, Size
from models.parts.rotary import RopeBase
from models.window_attention import WindowAttention


class SoftmaxAttention(WindowAttention):
    """x_BTD -> y_BTD; the state is that of `WindowAttention` with window = context_length."""

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        context_length: Reach,
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
        output_gate: bool = False,
        zero_centred_norm: bool = False,
        whole_norm: bool = False,
    ):
        super().__init__(
            width,
            depth=depth,
            rngs=rngs,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            window=context_length,
            heads=heads,
            key_value_heads=key_value_heads,
            rope=rope,
            rope_base=rope_base,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            size_per_head=size_per_head,
            rope_scaling=rope_scaling,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            rotary_size=rotary_size,
            output_gate=output_gate,
            zero_centred_norm=zero_centred_norm,
            whole_norm=whole_norm,
        )


Mixer = SoftmaxAttention
