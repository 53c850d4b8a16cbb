"""Diagonal convolution, the parallel form of S4D: the public function."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import Number, check_shape, flag, floats, number_parts
from ..framework.sharding import time_parts
from . import reference, xla
from .sequence_parallel import forward_in_parts


def diagonal_convolution(
    u: jax.Array,
    a: Number,
    b: Number,
    c: Number,
    *,
    initial_state: Number | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, Number]:
    """D linear systems, constant in time, each with one input, one output and M modes.

        h_t = a h_{t-1} + b u_t        y_t = sum_m Re(c_m h_{t,m})

    computed as a convolution with the kernel sum_m Re(c_m a_m^l b_m): S4D (Gu et al., 2022). The
    same as `diagonal_scan` of b u, read by c, without a state for every token. It has no segments:
    the scan serves those.

    Where a mesh cuts time, each device convolves its part and states pass between them
    (`ops/state_passing`).

    A complex number is a pair of real arrays (real part, imaginary part), as in `diagonal_scan`;
    a, b, c and initial_state are all arrays or all pairs.

    Args:
      u: [B, T, D], any T >= 1.
      a: [D, M]. Its powers up to a^T are formed, by products: |a| <= 1, but for few tokens.
      b: [D, M].
      c: [D, M].
      initial_state: [B, D, M], the state before the first token; None means zeros.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first.
      implementation: "reference" (a scan over tokens), "xla" (powers and the FFT; plain JAX on
        every backend), or None for "xla". A named implementation runs or raises.

    Returns:
      y [B, T, D] in u's dtype and the state after the last token [B, D, M] in float32, an array or
      a pair as a is. All is computed in float32; the error of "xla" is relative to the largest
      output of a channel. Differentiable in every input, and through both outputs.

    Raises:
      ValueError: for wrong forms, ranks, shapes, dtypes and names while tracing.
    """
    (u,) = floats(u=u)
    check_shape("u", u, "[B, T, D]", (None,) * 3)
    batch, length, systems = u.shape
    if length == 0 or systems == 0:
        raise ValueError(f"u must have T >= 1 and D >= 1; got {u.shape}")
    a_parts = number_parts("a", a)
    check_shape("a", a_parts[0], "[D, M] with D of u", (systems, None))
    shape = a_parts[0].shape
    b_parts = number_parts("b", b, like=("a", a_parts))
    c_parts = number_parts("c", c, like=("a", a_parts))
    check_shape("b", b_parts[0], "[D, M] like a", shape)
    check_shape("c", c_parts[0], "[D, M] like a", shape)
    state_parts = None
    if initial_state is not None:
        state_parts = number_parts("initial_state", initial_state, like=("a", a_parts))
        check_shape("initial_state", state_parts[0], "[B, D, M]", (batch, *shape))
    reverse = flag("reverse", reverse)
    implementation = platforms.checked_implementation(
        "diagonal_convolution", implementation, {"xla": xla}, batch
    )

    float_u, a_parts, b_parts, c_parts, state_parts = jax.tree.map(
        lambda x: x.astype(jnp.float32), (u, a_parts, b_parts, c_parts, state_parts)
    )
    if implementation == "reference":
        if state_parts is None:
            state_parts = tuple(jnp.zeros((batch, *shape), jnp.float32) for _ in a_parts)
        y, final = reference.diagonal_convolution(
            float_u, a_parts, b_parts, c_parts, state_parts, reverse
        )
    elif time_parts() == 1 and state_parts is None:
        y, final = xla.forward(float_u, a_parts, b_parts, c_parts, reverse)
    else:
        y, final = forward_in_parts(float_u, a_parts, b_parts, c_parts, state_parts, reverse)
    return y.astype(u.dtype), (final[0], final[1]) if len(final) == 2 else final[0]
