"""Gated linear attention: the public function."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import check_finite, flag, matrix_state
from ..framework.op import Op, run
from ..framework.sharding import decay_layout
from . import pallas_gpu, pallas_tpu, reference, sequence_parallel, xla

NAME = "gated_linear_attention"
ONE_STATE = Op(
    NAME, {"xla": xla, "pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}, sequence_parallel.RULES
)
# The GPU's kernels keep one state per sequence.
SEGMENT_STATES = Op(
    f"{NAME} with num_segments",
    {"xla": xla, "pallas_tpu": pallas_tpu},
    sequence_parallel.SEGMENT_RULES,
)


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention whose matrix state decays: not at all, by head, by token, or by token and
    channel.

        S_t = Diag(exp(decay_log_t)) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

    Linear attention (Katharopoulos et al., 2020), RetNet, Lightning Attention, GLA (Yang et al.,
    2024, eq. 3), HGRN2 and the SSD form of Mamba-2 are this recurrence with different `decay_log`.

    Args:
      q, k: [B, T, HK, K], any T >= 1. HK divides H; value head h reads key head h // (H / HK).
      v: [B, T, H, V].
      decay_log: natural log of the decay, finite and <= 0. None: no decay. [H]: constant per head.
        [B, T, H]: per token. [B, T, H, K]: per token and key channel.
      scale: factor on q; None means K**-0.5.
      initial_state: [B, H, K, V], the state before the first token; None means zeros. It belongs to
        the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the state starts from zero. None means one segment. What is not finite, such as a
        sum that overflows, stays in its segment with "reference", and with "xla" but for the
        tokens of other segments in its chunk of at most 64 tokens; the kernels do not hold it back.
        `ops.checks` finds it.
      num_segments: static S, for one state per segment instead of one per sequence. `segment_ids`
        must then be in 0..S-1 and non-decreasing along time (of each device, where a mesh cuts
        time); a segment may be empty. `initial_state` is [B, S, H, K, V]: each segment starts from
        its own state, and an empty one returns it unchanged.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first, and a segment starts with
        its last token.
      implementation: "reference" (a scan over tokens), "xla" (plain JAX), "pallas_tpu" and
        "pallas_gpu" (kernels; interpreted when lowered for a CPU; the GPU's without num_segments),
        or None for the best of the platform that the program is lowered for: the kernels on TPU and
        GPU where they can, else "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the state after the last token [B, H, K, V] in float32, with
      num_segments those after the last token of each segment [B, S, H, K, V]. The state and all
      sums are float32 whatever the inputs are, no exponent is positive and none is clipped; where
      q, k and v are bfloat16, the kernels round the factors of matmuls to bfloat16 too.
      Differentiable in every float input, and through both outputs; memory beyond inputs and
      outputs grows with T / 64 states, not with T states.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a positive or
        non-finite `decay_log` or, with num_segments, impossible `segment_ids` where values can be
        seen (an eager call, or under `ops.checks`).
    """
    given = matrix_state(q, k, v, decay_log, scale, initial_state, segment_ids, num_segments)
    reverse = flag("reverse", reverse)
    op = ONE_STATE if given.num_segments is None else SEGMENT_STATES
    implementation = platforms.checked_implementation(
        op.name, implementation, op.implementations, len(given.v)
    )
    if implementation == "reference":
        o, state = reference.gated_linear_attention(*given, reverse)
        return o.astype(given.v.dtype), state
    segments = {} if given.num_segments is None else {"num_segments": given.num_segments}
    states = "BSHKV" if segments else "BHKV"
    o, state = run(
        op,
        implementation,
        *given[:4],
        given.initial_state,
        given.segment_ids,
        layouts=("BTGK", "BTGK", "BTHV", decay_layout(given.decay_log), states, "BT"),
        outputs=("BTHV", states),
        dtypes=(given.v.dtype, jnp.dtype(jnp.float32)),
        reverse=reverse,
        scale=given.scale,
        **segments,
    )
    check_finite(given.segment_ids, o=o, state=state)
    return o, state
