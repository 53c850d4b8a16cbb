"""MossFormer2. Zhao, Ma, Ni, Zhang, Wang, Nguyen, Zhou, Yip, Ng, Ma, "MossFormer2: Combining
Transformer and RNN-Free Recurrent Network for Enhanced Time-Domain Monaural Speech Separation",
ICASSP 2024, arXiv 2312.11825; its attention is that of MossFormer (Zhao and Ma, ICASSP 2023, arXiv
2302.11824).

    x <- x + A(x),   x <- x + R(x)              A: gated attention;  R: the recurrent module

    s = x, its first half of channels from one token before
    v, u = F(s),   z = F(s)                     F: models/mossformer2/convolution.py
    q, k, q', k' = gamma_j z + beta_j           with rotary positions
    a_t = sum_{s in the group of t} relu(q_t k_s / g)^2 [v_s | u_s] + q'_t sum_s k'_s [v_s | u_s] /
    S A(x) = F((a^u v) sigmoid(a^v u))            a^v, a^u: the halves of a

R is in models/mossformer2/memory.py. The mixer is A and R: it returns y = A(x) + R(x + A(x)), to
which a block adds x, with `model.norm="none"` and `model.mlp="none"`: both have norms of their own.
With recurrent="none" it is MossFormer.

    g           group           tokens of a group; groups follow each other from the first token on
    S                           tokens of the sequence
    [v | u]     expand          times the width, each
    z           qk_size         one head
                rotary_size     channels of it that are turned, as neighbouring pairs
    R           recurrent       "dense": dilated, densely connected memory; "plain": one convolution
                                over time; "none"
                recurrent_width, order, dense_layers, gated

State: none, every token reads all others. Cost per token: O(g E + K E) of E = 2 expand D, and the
convolutions.

Departures: none known in the equations. The first values of linear maps and convolutions are
U(+-fan_in^-1/2), biases likewise. Tokens of a segment read each other and no others: groups,
positions, S and statistics are each segment's own. Where there are several, or padding, a group may
begin anywhere and its tokens are looked for in three blocks of g.

Authors' code: https://github.com/modelscope/ClearerVoice-Studio
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.mossformer2.attention import positions_and_groups, squared_relu_attention
from models.mossformer2.convolution import ConvolvedMap, ScaleNorm
from models.mossformer2.memory import RecurrentModule, segment_counts
from models.parts.options import Factor, Probability, Range, Reach, Size, check_choice
from models.parts.projections import NORMAL
from models.parts.rotary import check_pairs, rotate
from ops.bidirectional_linear_attention.api import bidirectional_linear_attention
from ops.framework import segments

HEADS = 4  # q and k of both parts
KINDS = ("dense", "plain", "none")
# Every tap and every dense layer is a part of the program.
Taps = Annotated[int, Range(1, 255)]
Order = Annotated[int, Range(1, 128)]
DenseLayers = Annotated[int, Range(1, 6)]


class GatedAttention(nnx.Module):
    """A: x_BTD -> y_BTD, of numbers of segments [B, T] or None for one."""

    def __init__(
        self,
        width: int,
        *,
        group: int,
        qk_size: int,
        rotary_size: int,
        expand: float,
        conv_width: int,
        global_attention: bool,
        dropout: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        if check_pairs(rotary_size, "rotary_size") > qk_size:
            raise ValueError(f"rotary_size must be at most qk_size={qk_size}; got {rotary_size}")
        if width % 2:
            raise ValueError(f"width must be even: half of it is shifted in time; got {width}")
        inner = round(expand * width)

        def convolved(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Any:
            norm = ScaleNorm(dtypes["param_dtype"])
            given: dict[str, Any] = {"taps": conv_width, "dropout": dropout, "rngs": rngs}
            return ConvolvedMap(norm, inputs, outputs, axes, **given, **dtypes)

        self.group, self.rotary_size, self.global_attention = group, rotary_size, global_attention
        self.hidden = convolved(width, 2 * inner, ("embed", "heads"))
        self.query_key = convolved(width, qk_size, ("embed", None))
        gamma_JK = NORMAL(rngs.params(), (HEADS, qk_size), dtypes["param_dtype"])
        self.gamma_JK = nnx.Param(gamma_JK, group="no_decay", out_sharding=(None, None))
        beta_JK = jnp.zeros((HEADS, qk_size), dtypes["param_dtype"])
        self.beta_JK = nnx.Param(beta_JK, group="no_decay", out_sharding=(None, None))
        self.output = convolved(inner, width, ("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, number_BT: jax.Array | None, positions: jax.Array | None
    ) -> jax.Array:
        s_BTD = token_shift(x_BTD, number_BT)
        v_BTE, u_BTE = jnp.split(self.hidden(s_BTD, number_BT), 2, axis=-1)
        z_BTK = self.query_key(s_BTD, number_BT)
        gamma_JK, beta_JK = (p[...].astype(z_BTK.dtype) for p in (self.gamma_JK, self.beta_JK))
        heads_BTJK = z_BTK[:, :, None] * gamma_JK[None, None] + beta_JK[None, None]

        position_BT, group_BT = positions_and_groups(x_BTD, number_BT, positions, self.group)
        heads_BTJK = rotated(heads_BTJK, position_BT, self.rotary_size)
        q_local, q_global, k_local, k_global = (heads_BTJK[:, :, j] for j in range(HEADS))
        vu_BTE = jnp.concatenate((v_BTE, u_BTE), axis=-1)
        a_BTE = squared_relu_attention(
            q_local, k_local, vu_BTE, group=self.group, group_BT=group_BT
        )
        if self.global_attention:
            count_BT1 = segment_counts(x_BTD, number_BT)
            sums_BTE = bidirectional_linear_attention(
                *(array[:, :, None] for array in (q_global, k_global, vu_BTE)),
                normalise=False,
                segment_ids=number_BT,
            )[:, :, 0]
            a_BTE = a_BTE + (sums_BTE.astype(jnp.float32) / count_BT1).astype(a_BTE.dtype)
        av_BTE, au_BTE = jnp.split(a_BTE, 2, axis=-1)
        return self.output((au_BTE * v_BTE) * jax.nn.sigmoid(av_BTE * u_BTE), number_BT)


def token_shift(x_BTD: jax.Array, number_BT: jax.Array | None) -> jax.Array:
    """x with the first half of its channels from the token before, zeros at the first of a
    segment."""
    shifted, kept = jnp.split(x_BTD, 2, axis=-1)
    shifted = jnp.pad(shifted[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if number_BT is not None:
        shifted = jnp.where(segments.starts(number_BT)[..., None], 0.0, shifted)
    return jnp.concatenate((shifted, kept), axis=-1)


def rotated(x_BTHK: jax.Array, position_BT: jax.Array, size: int) -> jax.Array:
    """Rotary positions of the first `size` channels, the pairs (2i, 2i + 1). The turned channels
    come in another order, the same for queries and keys: first those of even, then those of odd
    number."""
    pairs = jnp.concatenate((x_BTHK[..., 0:size:2], x_BTHK[..., 1:size:2]), axis=-1)
    turned = rotate(pairs, position_BT, base=10000.0)
    return jnp.concatenate((turned, x_BTHK[..., size:]), axis=-1)


class MossFormer2(nnx.Module):
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
        group: Reach = 256,
        qk_size: Size = 128,
        rotary_size: Size = 32,
        expand: Factor = 2.0,
        conv_width: Taps = 17,
        global_attention: bool = True,
        recurrent: str = "dense",
        recurrent_width: Size = 256,
        order: Order = 20,
        dense_layers: DenseLayers = 2,
        gated: bool = True,
        dropout: Probability = 0.1,
    ):
        check_choice("recurrent", recurrent, KINDS)
        if conv_width % 2 == 0:
            raise ValueError(
                f"conv_width must be odd, with the token in its middle; got {conv_width}"
            )
        given: dict[str, Any] = {
            "conv_width": conv_width,
            "dropout": dropout,
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        self.attention = GatedAttention(
            width,
            group=group,
            qk_size=qk_size,
            rotary_size=rotary_size,
            expand=expand,
            global_attention=global_attention,
            **given,
        )
        layers = dense_layers if recurrent == "dense" else 0
        sizes: dict[str, Any] = {"inner": recurrent_width, "order": order, "layers": layers}
        has = recurrent != "none"
        self.recurrent = RecurrentModule(width, gated=gated, **sizes, **given) if has else None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        number_BT = segments.numbers(segment_ids)
        y_BTD = self.attention(x_BTD, number_BT, positions)
        if self.recurrent is not None:
            y_BTD = y_BTD + self.recurrent(x_BTD + y_BTD, number_BT)
        return y_BTD, None


Mixer = MossFormer2
