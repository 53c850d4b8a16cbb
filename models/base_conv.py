"""BaseConv, the gated short convolution. Arora et al., "Zoology: Measuring and Improving Recall in
Efficient Language Models", ICLR 2024, arXiv 2312.04927; under the mixer of interest in Based (arXiv
2402.18668).

    y_t = (x_t W + b) * conv(x)_t + x_t

    x       x_BTD
    conv    taps of the last conv_width tokens per channel, with a bias

Gating and shift without a recurrence: the layer that lets the next one compare a token with its
neighbour.

State: the last conv_width - 1 inputs, (conv_width - 1) d numbers. Cost per token: O(d^2).

Departures: the short filter only, where the paper also has one as long as the sequence.
Initialisation: N(0, 0.02^2) for W, taps and their bias uniform on +-conv_width^-1/2.

Authors' code: https://github.com/HazyResearch/zoology
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.parts.projections import projection
from models.parts.short_convolution import ConvWidth, ShortConvolution


class BaseConv(nnx.Module):
    """x_BTD -> y_BTD; the state is {"conv" [B, conv_width - 1, D]}, float32."""

    causal = True

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
        conv_width: ConvWidth = 3,
    ):
        if conv_width < 1:
            raise ValueError(f"conv_width must be at least 1; got {conv_width}")
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.gate = projection(width, width, ("embed", "heads"), bias=True, rngs=rngs, **dtypes)
        self.conv = ShortConvolution(width, conv_width, bias=True, rngs=rngs, **dtypes)

    def __call__(
        self,
        x_BTD: jax.Array,
        state: dict[str, Any] | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        reverse: bool = False,
    ) -> tuple[jax.Array, dict[str, Any]]:
        past = (state or {}).get("conv")
        shifted_BTD, past = self.conv(x_BTD, past, segment_ids, reverse)
        return self.gate(x_BTD) * shifted_BTD + x_BTD, {"conv": past}

    def init_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token: zeros."""
        return {"conv": self.conv.init_state(batch)}


Mixer = BaseConv
