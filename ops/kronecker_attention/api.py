"""Kronecker attention, of each query to pairs of keys: the public function."""

import jax

from ..framework import platforms
from ..framework.arguments import check_shape, checked_segment_ids, flag, floats, number
from ..framework.op import Op, run
from . import reference, xla

OP = Op("kronecker_attention", {"xla": xla})
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def checked_arrays(
    q: jax.Array, k1: jax.Array, k2: jax.Array, v1: jax.Array, v2: jax.Array
) -> Arrays:
    """The five arrays. Raises ValueError for wrong ranks, shapes and dtypes."""
    q, k1, k2, v1, v2 = floats(q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    check_shape("q", q, "[B, T, H, K]", (None,) * 4)
    if 0 in q.shape[1:]:
        raise ValueError(f"q must be [B, T, H, K] with T, H and K at least 1; got {q.shape}")
    for name, key in (("k1", k1), ("k2", k2)):
        check_shape(name, key, "[B, T, H, K]", q.shape, " like q")
    check_shape("v1", v1, "[B, T, H, V]", (*q.shape[:3], None), " with B, T and H of q")
    check_shape("v2", v2, "[B, T, H, V]", v1.shape, " like v1")
    return q, k1, k2, v1, v2


def checked_scale(scale: float | None, key_size: int) -> float:
    """None means 1 / K, as in the paper."""
    if scale is None:
        return 1 / key_size
    return number("scale", scale, "None or a number > 0", lambda x: x > 0)


def kronecker_attention(
    q: jax.Array,
    k1: jax.Array,
    k2: jax.Array,
    v1: jax.Array,
    v2: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = False,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each query to pairs of tokens, of third order.

        o_i = sum_jk exp(A_ijk) (v1_j * v2_k) / sum_jk exp(A_ijk),    A_ijk = scale sum_l q_il k1_jl
                                                                              k2_kl

    (Alman and Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", ICLR 2024, arXiv 2310.04064.) Products of vectors are
    elementwise. With k2 and v2 of ones it is softmax attention with that scale. T^3 (K + V)
    multiplications, of T^2 numbers at a time and not T^3.

    Args:
      q: [B, T, H, K], any T >= 1.
      k1, k2: [B, T, H, K].
      v1, v2: [B, T, H, V].
      scale: None means 1 / K, as in the paper; two-simplicial attention has K**-0.5.
      causal: whether j <= i and k <= i.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: a token
        sees the run of equal ids that it is in. None means one segment.
      implementation: "reference" (all scores at once), "xla" (plain JAX on every backend), or None
        for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v1's dtype. All is computed in float32. Differentiable in the five arrays,
      and only they are kept for the backward pass. Time is whole on each device of a mesh.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    arrays = checked_arrays(q, k1, k2, v1, v2)
    options = {"scale": checked_scale(scale, q.shape[3]), "causal": flag("causal", causal)}
    segment_ids = checked_segment_ids(segment_ids, *arrays[0].shape[:2])
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(arrays[0])
    )
    dtype = arrays[3].dtype
    if implementation == "reference":
        return reference.kronecker_attention(*arrays, segment_ids, **options).astype(dtype)
    (o,) = run(
        OP,
        implementation,
        *arrays,
        segment_ids,
        layouts=(*("BLHK",) * 3, *("BLHV",) * 2, "BL"),
        outputs=("BLHV",),
        dtypes=(dtype,),
        **options,
    )
    return o
