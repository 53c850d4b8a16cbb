"""Kronecker attention in linear time, by a polynomial in the place of the exponential: the public
function."""

import math

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import check_shape, checked_segment_ids, flag, floats, integer
from ..framework.op import Op, run
from ..kronecker_attention.api import checked_arrays, checked_scale
from . import reference, xla

OP = Op("polynomial_kronecker_attention", {"xla": xla})


def polynomial_kronecker_attention(
    q: jax.Array,
    k1: jax.Array,
    k2: jax.Array,
    v1: jax.Array,
    v2: jax.Array,
    *,
    degree: int = 2,
    scale: float | None = None,
    causal: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kronecker_attention` with the Taylor polynomial of the exponential: two running sums.

        S1_t = S1_{t-1} + u(k1_t)^T (v1_t, 1)           u(x) = (prod_l x_l^a_l)_a,   |a| <= degree
        S2_t = S2_{t-1} + u(k2_t)^T (v2_t, 1)           w_a = scale^|a| / a!
        (n_t, m_t) = sum_a w_a u_a(q_t) (S1_ta * S2_ta)
        o_t = n_t / m_t

    (Alman and Song, ICLR 2024, arXiv 2310.04064.) That is sum_jk p(A_ijk) (v1_j * v2_k) / sum_jk
    p(A_ijk), p(x) = sum_{g <= degree} x^g / g!, for p(A) has the R = C(K + degree, degree) features
    of a product. The error falls with the degree and grows with the entries of q, k1 and k2, which
    models keep below one. p is positive for an even degree; for an odd one m may be near zero or
    negative where the entries are large. 2 T R (V + 1) multiplications for each sum.

    Args:
      q, k1, k2: [B, T, H, K], any T >= 1.
      v1, v2: [B, T, H, V].
      degree: at least 0, for which o is the product of the means of v1 and v2.
      scale: None means 1 / K.
      causal: whether a token sees itself and those before it, or all.
      initial_state: [B, H, 2, R, V + 1], the sums before the first token; None means zeros. It
        belongs to the first token's segment. Without a causal order there is none to give.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes the sums start from zero. None means one segment.
      reverse: whether to walk from the last token to the first; only with a causal order.
      implementation: "reference" (a scan over tokens), "xla" (plain JAX on every backend), or None
        for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v1's dtype, and the sums after the last token, float32 as all that is
      computed. Differentiable in the five arrays and the state, and through both outputs. Time is
      whole on each device of a mesh. What is not finite ends with its document, or reaches those
      with tokens in the same 16.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    arrays = checked_arrays(q, k1, k2, v1, v2)
    batch, _, heads, key_size = arrays[0].shape
    options = {
        "degree": integer("degree", degree, 0),
        "scale": checked_scale(scale, key_size),
        "causal": flag("causal", causal),
    }
    reverse = flag("reverse", reverse)
    if not causal and (reverse or initial_state is not None):
        raise ValueError("initial_state must be None and reverse False where causal is False")
    features = math.comb(key_size + options["degree"], options["degree"])
    sizes = (batch, heads, 2, features, arrays[3].shape[3] + 1)
    if initial_state is None:
        state = jnp.zeros(sizes, jnp.float32)
    else:
        (state,) = floats(initial_state=initial_state)
        check_shape("initial_state", state, "[B, H, 2, R, V + 1]", sizes)
    segment_ids = checked_segment_ids(segment_ids, *arrays[0].shape[:2])
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, batch
    )
    dtype = arrays[3].dtype
    inputs = (*arrays, state, segment_ids)
    if implementation == "reference":
        o, last = reference.polynomial_kronecker_attention(*inputs, **options, reverse=reverse)
        return o.astype(dtype), last
    return run(
        OP,
        implementation,
        *inputs,
        layouts=(*("BLHK",) * 3, *("BLHV",) * 2, "BHSRW", "BL"),
        outputs=("BLHV", "BHSRW"),
        dtypes=(dtype, jnp.dtype(jnp.float32)),
        reverse=reverse,
        **options,
    )
