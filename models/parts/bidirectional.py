"""An encoder's mixer made of a causal one: every token reads the tokens before and after it.

    y = f(x) + reversed(g(reversed(x)))                         combine="sum"
    y = [f(x), reversed(g(reversed(x)))] W                      combine="concatenation"

f and g are causal mixers with parameters of their own; reversed(x) has the tokens in the opposite
order. Both read the token itself. Segments stay apart, whichever way they are read. A mixer that
names `reverse` in its call's signature walks backwards itself. For others x is reversed: attention
and `seqboat` (`window_attention` looks back only), `monarch_mixer` (so does `long_convolution`) and
`mom` (its tokens are sorted by memory from the first to the last)."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import check_choice
from models.parts.projections import projection, residual_normal


def reverse(x_BT: jax.Array | None) -> Any:
    """The tokens of [B, T, ...] in the opposite order."""
    return None if x_BT is None else jnp.flip(x_BT, axis=1)


class Bidirectional(nnx.Module):
    """x_BTD -> y_BTD; there is no state. `make` returns a new causal mixer of the same width."""

    causal = False

    def __init__(
        self,
        make: Callable[[], Any],
        width: int,
        *,
        depth: int,
        combine: str = "sum",
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
        compute_dtype: DTypeLike,
    ):
        check_choice("combine", combine, ("sum", "concatenation"))
        self.forward, self.backward = make(), make()
        self.output = (
            projection(
                2 * width,
                width,
                ("heads", "embed"),
                init=residual_normal(depth),
                rngs=rngs,
                param_dtype=param_dtype,
                compute_dtype=compute_dtype,
            )
            if combine == "concatenation"
            else None
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        state: None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        forward_BTD, _ = self.forward(x_BTD, positions=positions, segment_ids=segment_ids)
        if "reverse" in inspect.signature(type(self.backward).__call__).parameters:
            # Where time is cut over devices, activations stay where they are: only states travel.
            backward_BTD, _ = self.backward(
                x_BTD, positions=positions, segment_ids=segment_ids, reverse=True
            )
        else:
            backward_BTD, _ = self.backward(
                reverse(x_BTD), positions=reverse(positions), segment_ids=reverse(segment_ids)
            )
            backward_BTD = reverse(backward_BTD)
        if self.output is None:
            return forward_BTD + backward_BTD, None
        return self.output(jnp.concatenate((forward_BTD, backward_BTD), axis=-1)), None
