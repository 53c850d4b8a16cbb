"""Queries, keys and values that each pass a short convolution, as in the delta rules and in the
"with convolution" forms of linear attention."""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.short_convolution import ShortConvolution


class ConvolvedProjections(nnx.Module):
    """What mixers with the maps `query`, `key` and `value` inherit to convolve them.

    A base class, because the convolutions' parameters lie in the mixer itself, as `conv_q`,
    `conv_k` and `conv_v`, and so do their states."""

    query: nnx.Linear
    key: nnx.Linear
    value: nnx.Linear

    def add_convolutions(
        self,
        key_width: int,
        value_width: int,
        conv_width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ) -> None:
        """Makes the three convolutions over `conv_width` tokens; 0: the identity."""
        given: dict[str, Any] = {
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }
        self.conv_q = ShortConvolution(key_width, conv_width, **given)
        self.conv_k = ShortConvolution(key_width, conv_width, **given)
        self.conv_v = ShortConvolution(value_width, conv_width, **given)

    def convolved(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any],
        segment_ids: jax.Array | None,
        *,
        reverse: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """conv(x W) for q, k, v, [B, T, H K] twice and [B, T, H V], before any activation, and the
        convolutions' next states; `state` {} is the state before the first token."""
        given = (segment_ids, reverse)
        q_BTD, conv_q = self.conv_q(self.query(x_BTD), state.get("conv_q"), *given)
        k_BTD, conv_k = self.conv_k(self.key(x_BTD), state.get("conv_k"), *given)
        v_BTD, conv_v = self.conv_v(self.value(x_BTD), state.get("conv_v"), *given)
        return q_BTD, k_BTD, v_BTD, {"conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v}

    def init_convolutions(self, batch: int) -> dict[str, Any]:
        """The convolutions' states before the first token: zeros."""
        return {
            "conv_q": self.conv_q.init_state(batch),
            "conv_k": self.conv_k.init_state(batch),
            "conv_v": self.conv_v.init_state(batch),
        }
