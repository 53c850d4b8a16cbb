"""The depthwise causal convolution in front of a recurrence, with its decode state."""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import Range
from models.parts.projections import FAN_IN_UNIFORM
from ops.short_convolution.api import short_convolution

# Every tap is a term of the program.
ConvWidth = Annotated[int, Range(0, 256)]


class ShortConvolution(nnx.Module):
    """y_t = sum_i w_i x_{t - W + 1 + i} (+ bias) per channel; the last tap is of the current input.

    width W = 1 is a learned scale per channel, W = 0 is no convolution: the identity, with no
    parameters and state None. Weights start as U(-W^-1/2, W^-1/2) (fan-in W, as a depthwise
    convolution has), and so does the bias."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        if width < 0:
            raise ValueError(f"conv_width must be 0 (no convolution) or positive; got {width}")
        self.channels, self.width, self.compute_dtype = channels, width, compute_dtype
        if width:
            weight = FAN_IN_UNIFORM(rngs.params(), (width, channels), param_dtype)
            self.weight_WD = nnx.Param(weight, out_sharding=(None, "heads"))
        else:
            self.weight_WD = None
        if width and bias:
            bound = width**-0.5
            bias_D = jax.random.uniform(rngs.params(), (channels,), param_dtype, -bound, bound)
            self.bias_D = nnx.Param(bias_D, out_sharding=("heads",))
        else:
            self.bias_D = None

    def __call__(
        self,
        x_BTD: jax.Array,
        state: jax.Array | None,
        segment_ids: jax.Array | None,
        reverse: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """y_BTD and the inputs that the next call needs; with `reverse` time runs backwards."""
        if self.weight_WD is None:
            return x_BTD, None
        weight_WD = self.weight_WD[...].astype(self.compute_dtype)
        y_BTD, state = short_convolution(
            x_BTD, weight_WD, initial_state=state, segment_ids=segment_ids, reverse=reverse
        )
        if self.bias_D is not None:
            y_BTD = y_BTD + self.bias_D[...].astype(self.compute_dtype)[None, None, :]
        return y_BTD, state

    def init_state(self, batch: int) -> jax.Array | None:
        """The W - 1 inputs before the first token: zeros [B, W-1, D] float32, None for W = 0."""
        if self.width == 0:
            return None
        return jnp.zeros((batch, self.width - 1, self.channels), jnp.float32)
