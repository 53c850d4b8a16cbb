"""Diagonal convolution with its time on several devices, or from a state: each part is convolved
from a zero state, states pass from part to part, and the response to the state that came in is
added.

    a over a part of n tokens is a^n        token t reads sum_m Re(c_m a_m^(t+1) h_m) of a state h

States are passed as [B, D M, X], the X real parts of each mode: 1 of real systems, 2 of complex
ones. A product with a number is a matrix [X, X] on its parts."""

import jax
import jax.numpy as jnp

from ..state_passing.parts import in_parts, passing
from .xla import Parts, einsum, forward, number, parts_of, powers


def forward_in_parts(
    u: jax.Array, a: Parts, b: Parts, c: Parts, initial_state: Parts | None, reverse: bool = False
) -> tuple[jax.Array, Parts]:
    """y [B, T, D] and the parts of the final state [B, D, M]."""
    a_DM, c_DM, shape = number(a), number(c), (u.shape[0], *a[0].shape)
    initial = None
    if initial_state is not None:
        initial = _joined(initial_state)

    def from_zero(u_PnD: jax.Array, _: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        y_PnD, state = forward(u_PnD, a, b, c)
        return y_PnD, _joined(state)

    y_BTD, final = in_parts(
        from_zero,
        passing(lambda length: transition(a_DM, length), reverse=reverse),
        lambda h, length: response(h, a_DM, c_DM, length),
        u,
        initial_state=initial,
        segment_ids=None,
        reverse=reverse,
    )
    return y_BTD, tuple(part.reshape(shape) for part in jnp.unstack(final, axis=-1))


def _joined(state: Parts) -> jax.Array:
    """[B, D M, X] of the parts [B, D, M]."""
    return jnp.stack([part.reshape(part.shape[0], -1) for part in state], axis=-1)


def transition(a_DM: jax.Array, length: int) -> jax.Array:
    """a^length as matrices [D M, X, X] that act on the parts of a number."""
    power = powers(a_DM, length + 1)[..., -1].reshape(-1)
    if not jnp.iscomplexobj(power):
        return power[:, None, None]
    real, imaginary = power.real, power.imag
    return jnp.stack([real, -imaginary, imaginary, real], axis=-1).reshape(-1, 2, 2)


def response(h: jax.Array, a_DM: jax.Array, c_DM: jax.Array, length: int) -> jax.Array:
    """What a state h [B, D M, X] before the first token adds to y: [B, length, D]."""

    # The powers, D M length numbers, are made anew in the backward pass.
    @jax.checkpoint
    def read(a_DM: jax.Array, c_DM: jax.Array, h_BDMX: jax.Array) -> jax.Array:
        weight_DMT = c_DM[..., None] * powers(a_DM, length + 1)[..., 1:]
        # Re(w h) = Re w Re h - Im w Im h.
        weights = jnp.stack(parts_of(jnp.conj(weight_DMT)))
        return einsum("xdmt,bdmx->btd", weights, h_BDMX)

    return read(a_DM, c_DM, h.reshape(-1, *a_DM.shape, h.shape[-1]))
