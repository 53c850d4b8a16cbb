"""Selective scan, the recurrence of Mamba: the public function."""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import (
    check_shape,
    check_values,
    checked_segment_ids,
    finite,
    flag,
    floats,
)
from ..framework.op import Op, run
from . import pallas_gpu, pallas_tpu, reference, sequence_parallel, xla

OP = Op(
    "selective_scan",
    {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu},
    sequence_parallel.RULES,
    keeps_chunk_states=True,
)
EIGENVALUE_RANGES = ((0, 1), (-1, 1))


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    eigenvalue_range: tuple[int, int] = (0, 1),
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A diagonal state-space model per channel whose step size, input and output maps depend on the
    token.

        h_t = abar_t h_{t-1} + delta_t x_t B_t        y_t = (h_t C_t + D x_t) silu(z_t)

    per channel d and state n; the gate silu(z) only where z is given. abar_t[d, n] = exp(delta_t[d]
    A[d, n]) (Mamba, Gu and Dao, 2023, eq. 2 and algorithm 2; zero-order hold for A and Euler's rule
    for B, as in the authors' code), or 2 exp(delta_t[d] A[d, n]) - 1 with `eigenvalue_range=(-1,
    1)` (Grazzi et al., 2025), which can change the sign of the state.

    Args:
      x: [B, T, D], any T >= 1.
      delta: [B, T, D], step sizes, finite and >= 0; with `delta_softplus` any finite numbers.
      A: [D, N], finite and <= 0.
      B, C: [B, T, N], shared by the channels.
      D: [D], a factor on x added to the output; None means none.
      z: [B, T, D], the gate before its activation; None means no gate.
      delta_bias: [D], added to `delta`; None means none.
      delta_softplus: whether softplus(delta + delta_bias), computed in float32, are the step sizes,
        rather than delta + delta_bias.
      eigenvalue_range: (0, 1) or (-1, 1), see above.
      initial_state: [B, D, N], the state before the first token; None means zeros. It belongs to
        the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the state starts from zero. None means one segment. What is not finite, such as a
        state that overflows, ends with its segment.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first, and a segment starts with
        its last token.
      implementation: "reference" (a scan over tokens), "xla" (plain JAX with a hand-written
        backward pass), "pallas_tpu" and "pallas_gpu" (kernels; interpreted when lowered for a CPU),
        or None for the best of the platform that the program is lowered for: the kernels on TPU
        and, where they support the sizes, on NVIDIA GPUs, else "xla". A named implementation runs
        or raises.

    Returns:
      y [B, T, D] in x's dtype, and the state after the last token [B, D, N] in float32. The state
      and all sums are float32 whatever the inputs are, no exponent is positive and none is clipped.
      Differentiable in every float input, and through both outputs; memory beyond inputs and
      outputs grows with T / 64 states, not with T states.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a negative or
        non-finite step or a positive or non-finite `A` where values can be seen (an eager call, or
        under `ops.checks`).
    """
    x, delta, A, B, C, D, z, delta_bias = floats(
        x=x, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias
    )
    inputs = x, delta, A, B, C, D, z, delta_bias
    initial_state = _checked_shapes(*inputs, *floats(initial_state=initial_state))
    segment_ids = checked_segment_ids(segment_ids, *x.shape[:2])
    delta_softplus = flag("delta_softplus", delta_softplus)
    reverse = flag("reverse", reverse)
    eigenvalue_range = _eigenvalue_range(eigenvalue_range)
    _check_steps(delta, delta_bias, delta_softplus)
    check_values("A", A, "finite and <= 0", lambda values: (values <= 0) & finite(values))
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(x)
    )
    if implementation == "reference":
        y, state = reference.selective_scan(
            *inputs, delta_softplus, eigenvalue_range, initial_state, segment_ids, reverse
        )
        return y.astype(x.dtype), state
    return run(
        OP,
        implementation,
        *inputs,
        initial_state,
        segment_ids,
        layouts=("BTH", "BTH", "HN", "BTN", "BTN", "H", "BTH", "H", "BHN", "BT"),
        outputs=("BTH", "BHN"),
        dtypes=(x.dtype, jnp.dtype(jnp.float32)),
        reverse=reverse,
        delta_softplus=delta_softplus,
        eigenvalue_range=eigenvalue_range,
    )


def _eigenvalue_range(given: Any) -> tuple[int, int]:
    if isinstance(given, tuple | list):
        for known in EIGENVALUE_RANGES:
            if tuple(given) == known:
                return known
    raise ValueError(f"eigenvalue_range must be (0, 1) or (-1, 1); got {given!r}")


def _checked_shapes(x, delta, A, B, C, D, z, delta_bias, initial_state) -> jax.Array:
    """The initial state, float32, zeros for None. Raises ValueError for arrays of wrong shapes."""
    check_shape("x", x, "[B, T, D]", (None,) * 3)
    batch, length, channels = x.shape
    if length == 0 or channels == 0:
        raise ValueError(f"x must have T >= 1 and D >= 1; got {x.shape}")
    check_shape("delta", delta, "[B, T, D] like x", x.shape)
    check_shape("A", A, "[D, N] with D of x", (channels, None))
    states = A.shape[1]
    if states == 0:
        raise ValueError(f"A must have N >= 1; got {A.shape}")
    check_shape("B", B, "[B, T, N] with N of A", (batch, length, states))
    check_shape("C", C, "[B, T, N] with N of A", (batch, length, states))
    if D is not None:
        check_shape("D", D, "[D]", (channels,))
    if z is not None:
        check_shape("z", z, "[B, T, D] like x", x.shape)
    if delta_bias is not None:
        check_shape("delta_bias", delta_bias, "[D]", (channels,))
    if initial_state is None:
        return jnp.zeros((batch, channels, states), jnp.float32)
    check_shape("initial_state", initial_state, "[B, D, N]", (batch, channels, states))
    return initial_state.astype(jnp.float32)


def _check_steps(delta, delta_bias, delta_softplus: bool) -> None:
    """Raises ValueError for step sizes that can be seen and are negative or not finite."""
    if delta_softplus:
        check_values("delta", delta, "finite", finite)
        check_values("delta_bias", delta_bias, "finite", finite)
    else:
        check_values(
            "delta" if delta_bias is None else "delta + delta_bias",
            delta if delta_bias is None else delta + delta_bias[None, None, :],
            "finite and >= 0",
            lambda values: (values >= 0) & finite(values),
        )
