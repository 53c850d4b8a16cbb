"""Linear attention to the tokens on both sides: the public function."""

import jax

from ..framework import platforms
from ..framework.arguments import attention_arrays, checked_segment_ids, flag, mask_array, number
from ..framework.op import Op, run
from . import reference, sequence_parallel, xla

OP = Op("bidirectional_linear_attention", {"xla": xla}, sequence_parallel.RULES)


def bidirectional_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    normalise: bool = True,
    eps: float = 1e-6,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Linear attention of each query to all keys, without a causal order.

        o_i = q_i (sum_j k_j^T v_j) / (q_i sum_j k_j + eps)
        o_i = q_i (sum_j k_j^T v_j)                          where normalise is False

    (Katharopoulos et al., 2020, arXiv 2006.16236, Eq. 4 to 6.) q and k are the features of queries
    and keys: elu + 1 there, relu in SLAB (Guo et al., 2024). LinFusion (Liu et al., 2024), whose
    denominator is q_i mean_j k_j + eps, divides its keys by their number. The cheaper of the orders
    (q k^T) v, linear in T S, and q (k^T v), linear in T + S, is taken by the sizes.

    Args:
      q: [B, T, H, K], any T >= 1.
      k: [B, S, HK, K], any S >= 1. HK divides H; query head h reads key and value head
        h // (H / HK).
      v: [B, S, HK, V].
      normalise: whether to divide by the sum of the weights. Features of mixed signs have sums that
        pass through zero: they want a norm of o instead.
      eps: what is added to the sum of the weights, >= 0.
      key_mask: [B, S] bool, the keys that there are; None means all. What stands in the others,
        finite or not, changes nothing, and their gradients are zeros.
      segment_ids: [B, T] integers where S is T, compared for equality with the previous token's
        only: a token sees the run of equal ids that it is in. None means one segment.
      implementation: "reference" (the matrix of weights), "xla" (plain JAX on every backend), or
        None for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype; zeros, with gradients of zero, where the denominator is zero and
      where no key is there. All sums are float32 whatever the inputs are. Differentiable in q, k
      and v; only they are kept for the backward pass.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    q, k, v = attention_arrays(q, k, v)
    key_mask = mask_array("key_mask", key_mask, *k.shape[:2])
    eps = number("eps", eps, "a number >= 0", lambda x: x >= 0)
    normalise = flag("normalise", normalise)
    if segment_ids is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            "segment_ids must be None where q and k have different lengths; got"
            f" {q.shape[1]} queries and {k.shape[1]} keys"
        )
    segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(q)
    )
    if implementation == "reference":
        o = reference.bidirectional_linear_attention(q, k, v, key_mask, segment_ids, normalise, eps)
        return o.astype(v.dtype)
    (o,) = run(
        OP,
        implementation,
        *(q, k, v, key_mask, segment_ids),
        layouts=("BTHK", "BTGK", "BTGV", "BT", "BT"),
        outputs=("BTHV",),
        dtypes=(v.dtype,),
        normalise=normalise,
        eps=eps,
    )
    return o
