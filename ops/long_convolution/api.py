"""Long convolution, the parallel form of linear time-invariant state-space models: the public
function."""

import functools

import jax

from ..framework import platforms
from ..framework.arguments import check_shape, checked_segment_ids, floats
from ..framework.op import Op, run
from . import reference, xla
from .documents import convolve_documents

OP = Op("long_convolution", {"xla": xla})


def long_convolution(
    u: jax.Array,
    kernel: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal convolution of each channel with a kernel as long as the sequence.

        y_t = sum_{l=0}^{t} kernel_l u_{t-l}

    the output of h_t = A h_{t-1} + B u_t, y_t = C h_t from h_{-1} = 0 where kernel_l = C A^l B:
    LSSL (Gu et al., 2021), S4 (Gu et al., 2022), S4D (Gu et al., 2022). It has no state: a
    recurrence serves that.

    Args:
      u: [B, T, D], any T >= 1.
      kernel: [D, T], kernel[:, l] on the token l steps back; or [B, D, T], one for each row, which
        needs rows without segments.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the sum starts anew. None means one segment. What is not finite stays in its
        segment, as a whole: the transform has no order. Segments cost log T convolutions
        instead of one (`documents.py`).
      implementation: "reference" (the sum as it stands, O(T^2)), "xla" (O(T log T), plain JAX on
        every backend), or None for "xla". A named implementation runs or raises.

    Returns:
      y [B, T, D] in u's dtype, computed in float32. The error of "xla" is relative to the largest
      output of a channel, not to each output. Differentiable in u and kernel; only they are kept
      for the backward pass where there are no segments.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    u, kernel = floats(u=u, kernel=kernel)
    check_shape("u", u, "[B, T, D]", (None,) * 3)
    _, length, channels = u.shape
    if length == 0 or channels == 0:
        raise ValueError(f"u must have T >= 1 and D >= 1; got {u.shape}")
    of_rows = kernel.ndim == 3 and segment_ids is None
    check_shape(
        "kernel",
        kernel,
        "[D, T], or without segment_ids [B, D, T], of the sizes of u",
        (len(u), channels, length) if of_rows else (channels, length),
    )
    segment_ids = checked_segment_ids(segment_ids, *u.shape[:2])
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(u)
    )
    if implementation == "reference":
        y = reference.long_convolution(u, kernel, segment_ids)
    elif segment_ids is not None:
        convolve = functools.partial(long_convolution, implementation=implementation)
        y = convolve_documents(u, kernel, segment_ids, convolve)
    else:
        # All of time for some of the channels: where a mesh cuts time, the devices exchange one for
        # the other.
        layouts = ("BLC", "BCL" if of_rows else "CL")
        (y,) = run(OP, implementation or "xla", u, kernel, layouts=layouts, outputs=("BLC",))
    return y.astype(u.dtype)
