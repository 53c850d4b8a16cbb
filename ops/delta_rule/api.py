"""The (gated) delta rule: the public function."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import (
    check_finite,
    check_shape,
    check_values,
    flag,
    floats,
    matrix_state,
)
from ..framework.op import Op, run
from ..framework.sharding import decay_layout
from . import pallas_gpu, pallas_tpu, reference, sequence_parallel, xla

NAME = "delta_rule"
ONE_STATE = Op(
    NAME, {"xla": xla, "pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}, sequence_parallel.RULES
)
# The GPU's kernels keep one state per sequence.
SEGMENT_STATES = Op(
    f"{NAME} with num_segments",
    {"xla": xla, "pallas_tpu": pallas_tpu},
    sequence_parallel.SEGMENT_RULES,
)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    decay_log: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention that writes the correction of what it reads, on a state that may decay.

        D_t = Diag(exp(decay_log_t)) S_{t-1}
        S_t = D_t + beta_t k_t^T (v_t - k_t D_t) = (I - beta_t k_t^T k_t) D_t + beta_t k_t^T v_t
        o_t = scale q_t S_t

    DeltaNet (Yang et al., 2024) has no decay, Gated DeltaNet (Yang et al., 2025) one per token, KDA
    (Kimi Linear, 2025) one per token and channel. The transition has the eigenvalue 1 - beta_t
    |k_t|^2 along k_t: `beta` up to 2 makes it negative for keys of unit length (Grazzi et al.,
    2025). Keys are not normalised here; beta_t |k_t|^2 > 2 makes the state grow.

    Args:
      q, k: [B, T, HK, K], any T >= 1. HK divides H; value head h reads key head h // (H / HK).
      v: [B, T, H, V].
      beta: [B, T, H], in [0, 2].
      decay_log: natural log of the decay, finite and <= 0. None: no decay. [H]: constant per head.
        [B, T, H]: per token. [B, T, H, K]: per token and key channel.
      scale: factor on q; None means K**-0.5.
      initial_state: [B, H, K, V], the state before the first token; None means zeros. It belongs to
        the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the state starts from zero. None means one segment. What is not finite, such as a
        sum that overflows, stays in its segment with "reference", and with "xla" in those that
        have tokens in its chunk of at most 64 tokens, or in a chunk with one that has; the kernels
        do not hold it back. `ops.checks` finds it.
      num_segments: static S, for one state per segment instead of one per sequence. `segment_ids`
        must then be in 0..S-1 and non-decreasing along time (of each device, where a mesh cuts
        time); a segment may be empty. `initial_state` is [B, S, H, K, V]: each segment starts from
        its own state, and an empty one returns it unchanged.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first, and a segment starts with
        its last token.
      implementation: "reference" (a scan over tokens), "xla" (plain JAX), "pallas_tpu" and
        "pallas_gpu" (kernels; interpreted when lowered for a CPU; the GPU's without num_segments),
        or None for the best of the platform that the program is lowered for: the kernels on TPU
        and, where they can, on GPU, else "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the state after the last token [B, H, K, V] in float32, with
      num_segments those after the last token of each segment [B, S, H, K, V]. The state and all
      sums are float32 whatever the inputs are, no exponent is positive and none is clipped; where
      q, k and v are bfloat16, the kernels round the factors of matmuls to bfloat16 too.
      Differentiable in every float input, and through both outputs; memory beyond inputs and
      outputs grows with T / 64 states, not with T states.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a positive or
        non-finite `decay_log`, a `beta` outside [0, 2] or, with num_segments, impossible
        `segment_ids` where values can be seen (an eager call, or under `ops.checks`).
    """
    given = matrix_state(q, k, v, decay_log, scale, initial_state, segment_ids, num_segments)
    (beta,) = floats(beta=beta)
    check_shape("beta", beta, "[B, T, H]", given.v.shape[:3])
    check_values("beta", beta, "in [0, 2]", lambda x: (x >= 0) & (x <= 2))
    reverse = flag("reverse", reverse)
    op = ONE_STATE if given.num_segments is None else SEGMENT_STATES
    implementation = platforms.checked_implementation(
        op.name, implementation, op.implementations, len(given.v)
    )
    if implementation == "reference":
        o, state = reference.delta_rule(*given[:3], beta, *given[3:], reverse)
        return o.astype(given.v.dtype), state
    segments = {} if given.num_segments is None else {"num_segments": given.num_segments}
    states = "BSHKV" if segments else "BHKV"
    o, state = run(
        op,
        implementation,
        *given[:3],
        beta,
        given.decay_log,
        given.initial_state,
        given.segment_ids,
        layouts=("BTGK", "BTGK", "BTHV", "BTH", decay_layout(given.decay_log), states, "BT"),
        outputs=("BTHV", states),
        dtypes=(given.v.dtype, jnp.dtype(jnp.float32)),
        reverse=reverse,
        scale=given.scale,
        **segments,
    )
    check_finite(given.segment_ids, o=o, state=state)
    return o, state
