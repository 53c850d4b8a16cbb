"""Flow attention to all tokens: the public function."""

import jax

from ..framework import platforms
from ..framework.arguments import (
    attention_arrays,
    checked_segment_ids,
    choice,
    flag,
    mask_array,
    number,
)
from . import reference, xla


def flow_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: str = "sigmoid",
    competition: bool = True,
    allocation: bool = True,
    clip: float | None = 1.0,
    eps: float = 1e-6,
    query_mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Flow attention of T queries, the sinks, to S keys, the sources.

        I_i = q_i sum_j k_j                 O_j = k_j sum_i q_i
        Ihat_i = q_i sum_j k_j / O_j        Ohat_j = k_j sum_i q_i / I_i
        c_j = S softmax_j(clip(Ohat))
        o_i = sigmoid(Ihat_i T / S) (q_i / I_i) sum_j k_j^T c_j v_j

    with q and k for phi(q) and phi(k) (Wu et al., Flowformer, ICML 2022, arXiv 2202.06258, Eq. 4 to
    8): linear attention whose sources compete for what the sinks let in, c, and whose sinks are
    opened as far as the sources want them, the sigmoid. The authors' vision code clips Ohat to
    [-1, 1]. It is made of `bidirectional_linear_attention`, of one column for a flow.

    Args:
      q: [B, T, H, K], any T >= 1.
      k: [B, S, H, K], any S >= 1.
      v: [B, S, H, V].
      feature_map: phi, "sigmoid", "relu", which is relu + 1e-6, or "identity" for q and k that are
        positive already.
      competition: whether c weighs the sources; if not it is 1.
      allocation: whether the sigmoid weighs the sinks; if not it is 1.
      clip: Ohat is cut to [-clip, clip]; None leaves it.
      eps: what is added to every component of both factors of the first four products, >= 0.
      query_mask: [B, T] bool, the sinks that there are; None means all. The outputs of the others
        are zeros, and what stands in them changes nothing. Padding is neither sink nor source.
      key_mask: [B, S] bool, the sources that there are; likewise.
      segment_ids: [B, T] integers where S is T, compared for equality with the previous token's
        only: each run of equal ids is on its own, with its own T and S. None means one segment.
      implementation: "reference" (matrices [T, S]), "xla" (linear in T + S; plain JAX on every
        backend), or None for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, zeros where no source is there. All is computed in float32.
      Differentiable in q, k and v; only the inputs are kept for the backward pass.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    q, k, v = attention_arrays(q, k, v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have as many heads as q, {q.shape[2]}; got {k.shape[2]}")
    options = {
        "feature_map": choice("feature_map", feature_map, tuple(reference.FEATURE_MAPS)),
        "competition": flag("competition", competition),
        "allocation": flag("allocation", allocation),
        "clip": None,
        "eps": number("eps", eps, "a number >= 0", lambda x: x >= 0),
    }
    if clip is not None:
        options["clip"] = number("clip", clip, "None or a number > 0", lambda x: x > 0)
    query_mask = mask_array("query_mask", query_mask, *q.shape[:2])
    key_mask = mask_array("key_mask", key_mask, *k.shape[:2])
    if segment_ids is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            "segment_ids must be None where q and k have different lengths; got"
            f" {q.shape[1]} queries and {k.shape[1]} keys"
        )
    segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    implementation = platforms.checked_implementation(
        "flow_attention", implementation, {"xla": xla}, len(q)
    )
    form = reference if implementation == "reference" else xla
    o = form.flow_attention(q, k, v, query_mask, key_mask, segment_ids, **options)
    return o.astype(v.dtype)
