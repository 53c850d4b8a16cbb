"""Short convolution, the depthwise causal convolution in front of many recurrences: the public
function."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import check_shape, checked_segment_ids, flag, floats
from ..framework.op import Op, run
from . import pallas_tpu, reference, sequence_parallel, xla

OP = Op("short_convolution", {"xla": xla, "pallas_tpu": pallas_tpu}, sequence_parallel.RULES)


def short_convolution(
    x: jax.Array,
    w: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal convolution of each channel over W tokens of its segment; the last tap multiplies the
    current token.

        y_t = sum_{i=0}^{W-1} w_{W-1-i} x_{t-i}

    with x zero before the segment. Mamba (Gu and Dao, 2023), GLA and DeltaNet use W = 4; no bias,
    no activation.

    Args:
      x: [B, T, D], any T >= 1.
      w: [W, D], any W >= 1.
      initial_state: [B, W - 1, D], the W - 1 inputs before the first token, oldest first; None
        means zeros. It belongs to the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes a segment starts. None means one segment. What is not finite ends with it.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first, and a segment starts with
        its last token. "Oldest first" is then the last token first.
      implementation: "reference" (a scan over tokens), "xla" (shifted multiply-adds in plain JAX),
        "pallas_tpu" (kernels; interpreted when lowered for a CPU), or None for the best of the
        platform that the program is lowered for: the kernels on TPU, else "xla". A named
        implementation runs or raises.

    Returns:
      y [B, T, D] in x's dtype, summed in float32, and the state after the last token [B, W - 1, D]
      in float32: the last W - 1 inputs unchanged, zeros where the last token's segment had not
      begun. Differentiable in every float input, and through both outputs; only the inputs are kept
      for the backward pass.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    x, w, initial_state = floats(x=x, w=w, initial_state=initial_state)
    check_shape("x", x, "[B, T, D]", (None,) * 3)
    batch, length, channels = x.shape
    if length == 0 or channels == 0:
        raise ValueError(f"x must have T >= 1 and D >= 1; got {x.shape}")
    check_shape("w", w, "[W, D] with D of x", (None, channels))
    taps = w.shape[0]
    if taps == 0:
        raise ValueError(f"w must have W >= 1; got {w.shape}")
    if initial_state is not None:
        check_shape("initial_state", initial_state, "[B, W - 1, D]", (batch, taps - 1, channels))
    segment_ids = checked_segment_ids(segment_ids, batch, length)
    reverse = flag("reverse", reverse)
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, batch
    )

    if initial_state is None:
        initial_state = jnp.zeros((batch, taps - 1, channels), jnp.float32)
    if implementation == "reference":
        y, state = reference.short_convolution(x, w, initial_state, segment_ids, reverse)
    else:
        y, state = run(
            OP,
            implementation,
            x,
            w,
            initial_state,
            segment_ids,
            layouts=("BTH", "WH", "BWH", "BT"),
            outputs=("BTH", "BWH"),
            reverse=reverse,
        )
    return y.astype(x.dtype), state
