"""Diagonal scan, the recurrence of S4D, S5 and the LRU: the public function."""

from typing import Any

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import (
    Number,
    check_shape,
    check_values,
    checked_segment_ids,
    finite,
    flag,
    number_parts,
)
from ..framework.op import Op, run
from . import pallas_gpu, pallas_tpu, reference, sequence_parallel, xla


def _states_for_inputs(inputs: Any, outputs: Any) -> Any:
    """For the backward rule: h, in float32, in the place of b."""
    (a, _, *others), (h, _) = inputs, outputs
    return a, h, *others


OP = Op(
    "diagonal_scan",
    {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu},
    sequence_parallel.RULES,
    _states_for_inputs,
)


def diagonal_scan(
    a: Number,
    b: Number,
    *,
    initial_state: Number | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """A linear recurrence in each channel by itself, real or complex.

        h_t = a_t h_{t-1} + b_t

    the discretised state equation of diagonal state-space models: S4D (Gu et al., 2022), S5 (Smith
    et al., 2023) and the linear recurrent unit (Orvieto et al., 2023).

    A complex number is a pair of real arrays (real part, imaginary part), of one shape. Not a
    complex dtype: kernels have none, a pair can be in bfloat16, states go through checkpoints as
    they are, and gradients are those of the two real arrays, with no convention about conjugation.
    `a`, `b` and `initial_state` are all arrays or all pairs.

    Args:
      a: [N], the same for all tokens, or [B, T, N]; finite. It may be 0, negative or, where the
        state may grow, larger than 1: it is never divided by or taken to a logarithm.
      b: [B, T, N], any T >= 1.
      initial_state: [B, N], the state before the first token; None means zeros. It belongs to the
        first token's segment.
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
      h [B, T, N] in b's dtype and the state after the last token [B, N] in float32, arrays or pairs
      as b is. The state is float32 whatever the inputs are. Differentiable in every float input,
      and through both outputs. The backward pass takes h, which is kept in float32, and not b: of
      float32 inputs it keeps no more than they and the output. A bfloat16 b halves what the kernels
      read of it, not what they write or keep.

    Raises:
      ValueError: for wrong forms, ranks, shapes, dtypes and names while tracing, and for a
        non-finite `a` where values can be seen (an eager call, or under `ops.checks`).
    """
    b_parts = number_parts("b", b)
    a_parts = number_parts("a", a, like=("b", b_parts))
    check_shape("b", b_parts[0], "[B, T, N]", (None,) * 3)
    batch, length, channels = b_parts[0].shape
    if length == 0 or channels == 0:
        raise ValueError(f"b must have T >= 1 and N >= 1; got {b_parts[0].shape}")
    if jnp.ndim(a_parts[0]) == 1:
        check_shape("a", a_parts[0], "[N] with N of b", (channels,))
    else:
        check_shape("a", a_parts[0], "[N] or [B, T, N] like b", (batch, length, channels))
    if initial_state is None:
        state_parts = tuple(jnp.zeros((batch, channels), jnp.float32) for _ in b_parts)
    else:
        state_parts = number_parts("initial_state", initial_state, like=("b", b_parts))
        check_shape("initial_state", state_parts[0], "[B, N]", (batch, channels))
    segment_ids = checked_segment_ids(segment_ids, batch, length)
    reverse = flag("reverse", reverse)
    for part in a_parts:
        check_values("a", part, "finite", finite)
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, batch
    )

    if implementation == "reference":
        h, state = reference.diagonal_scan(a_parts, b_parts, state_parts, segment_ids, reverse)
    else:
        h, state = run(
            OP,
            implementation,
            a_parts,
            b_parts,
            state_parts,
            segment_ids,
            layouts=("H" if a_parts[0].ndim == 1 else "BTH", "BTH", "BH", "BT"),
            outputs=("BTH", "BH"),
            reverse=reverse,
        )
    h = jax.tree.map(lambda part, like: part.astype(like.dtype), h, b_parts)
    return (h, state) if len(b_parts) == 2 else (h[0], state[0])
