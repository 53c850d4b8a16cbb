"""State passing of linear time-invariant systems: what a sequence that is cut into parts hands from
part to part."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import check_shape, flag, floats
from ..framework.op import Op, run
from . import reference, sequence_parallel, xla

OP = Op("state_passing", {"xla": xla}, sequence_parallel.RULES)


def state_passing(
    A: jax.Array,
    written: jax.Array,
    *,
    keeps: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The state before each part of a sequence, from what each part writes by itself.

        S_{t+1} = keep_t A S_t + M_t

    for D systems with dense state matrices; A is the transition over a whole part. This is the
    middle one of the three steps of a chunked recurrence: states of chunks, state passing, outputs
    of chunks (Dao and Gu, 2024, arXiv 2405.21060, Section 6). Where a mesh cuts time, its devices
    hold consecutive parts, and states travel as those of every recurrence do
    (`ops/framework/sequence_parallel.py`); A does not travel, because every device knows it.

    Args:
      A: [D, N, N], the transition over one part.
      written: [B, T, D, N], M: the state that each of T >= 1 parts leaves where it begins with
        zeros.
      keeps: [B, T] bool, false where a part does not hand on what came in, because a document
        starts in it. None: all do.
      initial_state: [B, D, N], the state before the first part; None means zeros.
      reverse: whether to walk from the last part to the first. `initial_state` is then the one
        after the last part, S_t the state that part t receives from the part after it.
      implementation: "reference" (differentiated by JAX), "xla" (with a backward pass of its own),
        or None for "xla". A named implementation runs or raises.

    Returns:
      S_t before every part [B, T, D, N], and the state after the last part [B, D, N], float32.
      Differentiable in A, written and initial_state.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    A, written, initial_state = floats(A=A, written=written, initial_state=initial_state)
    check_shape("written", written, "[B, T, D, N]", (None,) * 4)
    batch, parts, systems, size = written.shape
    if parts == 0:
        raise ValueError(f"written must have T >= 1; got {written.shape}")
    check_shape("A", A, "[D, N, N] with D and N of written", (systems, size, size))
    if keeps is not None:
        check_shape("keeps", keeps, "[B, T] of written", (batch, parts))
        if jnp.result_type(keeps) != jnp.bool_:
            raise ValueError(f"keeps must be bool; got {jnp.result_type(keeps)}")
    if initial_state is None:
        initial_state = jnp.zeros((batch, systems, size), jnp.float32)
    check_shape("initial_state", initial_state, "[B, D, N] of written", (batch, systems, size))
    reverse = flag("reverse", reverse)
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, batch
    )
    inputs = A, written, keeps, initial_state
    if implementation == "reference":
        return reference.state_passing(*inputs, reverse=reverse)
    return run(
        OP,
        implementation or "xla",
        *inputs,
        layouts=("Hnn", "BTHn", "BT", "BHn"),
        outputs=("BTHn", "BHn"),
        reverse=reverse,
    )
