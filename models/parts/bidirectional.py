"""Every token reads the tokens before and after it: what mixers with causal=False share, and an
encoder's mixer made of any causal one.

    y_t = sum_{s <= t} k_{t-s} x_s + sum_{s > t} k'_{s-t-1} x_s

is how S4 (Gu et al., 2022), and what came of it, reads in two directions: one long kernel made of
two, that of the past k and that of the future k', whose first lag is the next token (`following`).
Others read the token itself in both. `Bidirectional` is for mixers without such a form:

    y = f(x) + reversed(g(reversed(x)))                         combine="sum"
    y = [f(x), reversed(g(reversed(x)))] W                      combine="concatenation"

f and g are causal mixers with parameters of their own; reversed(x) has the tokens in the opposite
order. Both read the token itself. Segments stay apart, whichever way they are read. A mixer that
names `reverse` in its call's signature walks backwards itself. For others x is reversed: attention,
and what has a window of it (`liger`, `lolcats`, `seqboat`), because `window_attention` looks back
only; `monarch_mixer` (so does `long_convolution`); and `mom` (its tokens are sorted by memory from
the first to the last)."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.parts.options import check_choice
from models.parts.projections import projection, residual_normal
from ops.framework import segments


def reversed_tokens(x_BT: jax.Array | None) -> Any:
    """The tokens of [B, T, ...] in the opposite order."""
    return None if x_BT is None else jnp.flip(x_BT, axis=1)


def following(
    y_BTD: jax.Array, segment_ids: jax.Array | None, *, reverse: bool = False
) -> jax.Array:
    """y of the next token, [B, T, D]; zeros at the last of a segment. In reverse of the one
    before."""
    if reverse:
        return following(y_BTD[:, ::-1], reversed_tokens(segment_ids))[:, ::-1]
    next_BTD = jnp.pad(y_BTD[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if segment_ids is None:
        return next_BTD
    return jnp.where(segments.starts(segment_ids, reverse=True)[..., None], 0.0, next_BTD)


def without_padding(x_BTD: jax.Array, mask_BT: jax.Array | None) -> jax.Array:
    """x with zeros for padding: what a convolution reads of tokens that are not there."""
    return x_BTD if mask_BT is None else jnp.where(mask_BT[..., None], x_BTD, 0.0)


def no_state(mixer: str) -> ValueError:
    """Why a mixer whose option `causal` is False cannot decode."""
    return ValueError(f"{mixer} with causal=False has no state: a token reads later ones")


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
                reversed_tokens(x_BTD),
                positions=reversed_tokens(positions),
                segment_ids=reversed_tokens(segment_ids),
            )
            backward_BTD = reversed_tokens(backward_BTD)
        if self.output is None:
            return forward_BTD + backward_BTD, None
        return self.output(jnp.concatenate((forward_BTD, backward_BTD), axis=-1)), None
