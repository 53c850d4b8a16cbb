"""S-Mamba. Wang, Kong, Feng, Wang, Yang, Zhang, Zhang, "Is Mamba Effective for Time Series
Forecasting?", Neurocomputing 619, 2025, 129178, arXiv 2403.11144.

    y = Mamba_f(E) + flip(Mamba_b(flip(E)))         flip: tokens in the opposite order

    E           x_BTD       tokens; in the paper variates of a series, in models/networks/forecaster
    Mamba_f     f           the recurrence of models/mamba.py, with parameters of its own for each
    Mamba_b     g           direction
    N           state_size  2 to 32 in the paper; expand 1, and a convolution over 2 tokens

The paper's block around it, y = E + this, a = LN(y), E' = LN(a + drop(W_2 drop(gelu(W_1 a)))), is
that of the backbone with pre_norm=False, mlp="gelu", mlp_width and mlp_dropout. The order of
variates matters to it. With bidirectional=False there is Mamba_f alone, the paper's ablation.

State: none, every token reads all others. Cost per token: two of Mamba, O(E N).

Departures: none known. As in the layer that the authors' code calls, and other than in
models/mamba.py by itself, W_out is not divided by sqrt(depth) at the start.

Authors' code: https://github.com/wzhwzhwzh0921/S-D-Mamba
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.mamba import Mamba
from models.parts.bidirectional import Bidirectional
from models.parts.options import Count, Factor, Size
from models.parts.short_convolution import ConvWidth


class SMamba(nnx.Module):
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
        expand: Factor = 1.0,
        state_size: Size = 32,
        dt_rank: Count = 0,
        dt_min: Factor = 1e-3,
        dt_max: Factor = 1e-1,
        conv_width: ConvWidth = 2,
        bidirectional: bool = True,
    ):
        given: dict[str, Any] = {
            "rngs": rngs,
            "param_dtype": param_dtype,
            "compute_dtype": compute_dtype,
        }

        def make() -> Mamba:
            return Mamba(
                width,
                depth=1,  # W_out as in a layer by itself
                expand=expand,
                state_size=state_size,
                dt_rank=dt_rank,
                dt_min=dt_min,
                dt_max=dt_max,
                conv_width=conv_width,
                **given,
            )

        both = bidirectional
        self.mamba: Any = Bidirectional(make, width, depth=depth, **given) if both else make()

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        y_BTD, _ = self.mamba(x_BTD, positions=positions, segment_ids=segment_ids)
        return y_BTD, None


Mixer = SMamba
