"""Dense scan, the recurrence of S4 and LSSL: the public function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import check_finite, check_shape, checked_segment_ids, flag, floats
from ..framework.sharding import time_parts
from . import reference, xla
from .sequence_parallel import forward_in_parts


def dense_scan(
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    kernel: Callable[[int], jax.Array] | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """D linear systems, constant in time, each with one input and a dense state matrix of its own.

        x_t = A x_{t-1} + B u_t        y_t = C x_t

    the discretised state equation of LSSL (Gu et al., 2021) and S4 (Gu et al., 2022). The output is
    also the convolution of u with the kernel C A^l B.

    Where a mesh cuts time, each device runs its part and states pass between them
    (`ops/state_passing`); batch and channels are the compiler's to cut.

    Args:
      u: [B, T, D], any T >= 1.
      A: [D, N, N]. Its powers are formed: they must stay bounded in float32, as those of a
        contraction do.
      B: [D, N].
      C: [D, M, N], M outputs of each system.
      kernel: length -> the kernel [D, M, length], C A^l B for l = 0 .. length - 1, in float32, of a
        caller that has it or can make it cheaply (`krylov_kernel` makes it for any system). A call
        without initial_state and segment_ids is then a convolution. None: the recurrence always.
      initial_state: [B, D, N], the state before the first token; None means zeros. It belongs to
        the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the state starts from zero. None means one segment. What is not finite stays in
        its segment with "reference", and with "xla" but for the tokens of other segments in its
        chunk of 32 tokens; `ops.checks` finds it.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first, and a segment starts with
        its last token.
      implementation: "reference" (a scan over tokens), "xla" (a convolution, or a scan over chunks;
        plain JAX on every backend), or None for "xla". A named implementation runs or raises.

    Returns:
      y [B, T, D, M] in u's dtype and the state after the last token [B, D, N] in float32. All is
      computed in float32. Differentiable in every float input, and through both outputs.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    u, A, B, C, initial_state = floats(u=u, A=A, B=B, C=C, initial_state=initial_state)
    check_shape("u", u, "[B, T, D]", (None,) * 3)
    batch, length, systems = u.shape
    if length == 0 or systems == 0:
        raise ValueError(f"u must have T >= 1 and D >= 1; got {u.shape}")
    check_shape("B", B, "[D, N] with D of u", (systems, None))
    size = B.shape[1]
    check_shape("A", A, "[D, N, N] with D of u and N of B", (systems, size, size))
    check_shape("C", C, "[D, M, N] with D of u and N of B", (systems, None, size))
    if initial_state is not None:
        check_shape("initial_state", initial_state, "[B, D, N]", (batch, systems, size))
    segment_ids = checked_segment_ids(segment_ids, batch, length)
    if kernel is not None and not callable(kernel):
        raise ValueError(f"kernel must be None or a function of the length; got {kernel!r}")
    reverse = flag("reverse", reverse)
    implementation = platforms.checked_implementation(
        "dense_scan", implementation, {"xla": xla}, batch
    )

    float_u, A, B, C = (array.astype(jnp.float32) for array in (u, A, B, C))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    if implementation == "reference":
        zeros = jnp.zeros((batch, systems, size), jnp.float32)
        first = zeros if initial_state is None else initial_state
        y, state = reference.dense_scan(float_u, A, B, C, first, segment_ids, reverse)
    else:
        if initial_state is not None or segment_ids is not None:
            kernel = None
        forward = xla.forward if time_parts() == 1 else forward_in_parts
        y, state = forward(float_u, A, B, C, initial_state, segment_ids, kernel, reverse)
    y = y.astype(u.dtype)
    check_finite(segment_ids, y=y, state=state)
    return y, state
