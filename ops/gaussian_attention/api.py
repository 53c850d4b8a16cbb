"""Attention by a Gaussian kernel through landmarks: the public function."""

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import (
    check_shape,
    flag,
    floats,
    integer,
    integer_array,
    mask_array,
    number,
)
from ..framework.op import Op, run
from . import reference, sequence_parallel, xla

# Residuals below this are rounding.
LEAST_RESIDUAL = 1e-6

OP = Op("gaussian_attention", {"xla": xla}, sequence_parallel.RULES)


def gaussian_attention(
    q: jax.Array,
    landmarks: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    normalise: bool = False,
    iterations: int = 20,
    jitter: float = 0.0,
    key_mask: jax.Array | None = None,
    documents: jax.Array | None = None,
    landmark_documents: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T tokens to each other by a Gaussian kernel, approximated through m landmarks.

        S(x, y)_ij = exp(-scale |x_i - y_j|^2 / 2)      A = S(l, l)      P = S(l, q)
        o = P^T A^+ (P v)                               with `normalise`  P^T D A^+ D (P v),
                                                        D = diag(A 1)^(-1/2)

    (Lu et al., SOFT, NeurIPS 2021, arXiv 2110.11945, Eq. 7 to 10; normalised: Softmax-free Linear
    Transformers, IJCV 2024.) q serves as queries and keys, so that the kernel is symmetric. A^+
    comes from matrix products, Newton's iteration

        Y_0 = 1.8 A / |A|_1^2       Y <- 2 Y - Y A Y

    which converges to it in exact arithmetic. In float32 it stops to where landmarks nearly agree:
    an iterate is taken only while it lowers |A Y A - A| / |A|, so that o is a number,
    and what is left of this is returned. The gradient is that of an inverse,
    dA = -Y^T dY Y^T, and does not pass through the iteration.

    Args:
      q: [B, T, H, K], any T >= 1.
      landmarks: [B, m, H, K], any m >= 1, such as averages of q over patches.
      v: [B, T, H, V].
      scale: of the squared distance; None means K**-0.5.
      normalise: whether the landmarks' row sums are divided out. Without it the norm of the map
        from v to o grows with T.
      iterations: of Newton's method, at least 1.
      jitter: what the iteration adds to the diagonal of A, >= 0; the authors' code has 0.01.
      key_mask: [B, T] bool, the tokens that there are; None means all. The others give nothing, and
        what stands in them changes nothing; their outputs are zeros.
      documents: [B, T] integers; a token sees the landmarks of its own document, of which landmarks
        have the same number: they are compared with each other, not along time. None means one.
      landmark_documents: [B, m] integers, given where documents are. A landmark with a number that
        no token has is not there.
      implementation: "reference" (all products as they stand), "xla" (plain JAX on every backend),
        or None for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the residual [B, H] in float32, |A Y A - A| / |A| in
      Frobenius norms, of the document where it is largest, and 1e-6 where it is less, which is
      rounding; it has no gradient. All is computed in float32. Differentiable in q, landmarks
      and v; only the inputs are kept for the backward pass.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    q, landmarks, v = floats(q=q, landmarks=landmarks, v=v)
    check_shape("q", q, "[B, T, H, K]", (None,) * 4)
    batch, length, heads, key_size = q.shape
    if 0 in (length, heads, key_size):
        raise ValueError(f"q must be [B, T, H, K] with T, H and K at least 1; got {q.shape}")
    like = " with B, H and K of q"
    check_shape("landmarks", landmarks, "[B, m, H, K]", (batch, None, heads, key_size), like)
    if landmarks.shape[1] == 0:
        raise ValueError(f"landmarks must be [B, m, H, K] with m at least 1; got {landmarks.shape}")
    check_shape("v", v, "[B, T, H, V]", (batch, length, heads, None), " with B, T and H of q")
    options = {
        "scale": key_size**-0.5,
        "normalise": flag("normalise", normalise),
        "iterations": integer("iterations", iterations, 1),
        "jitter": number("jitter", jitter, "a number >= 0", lambda x: x >= 0),
    }
    if scale is not None:
        options["scale"] = number("scale", scale, "None or a number > 0", lambda x: x > 0)
    key_mask = mask_array("key_mask", key_mask, batch, length)
    if (documents is None) != (landmark_documents is None):
        raise ValueError("landmark_documents must be given where documents are, and only there")
    documents = integer_array("documents", documents, "[B, T]", (batch, length))
    landmark_documents = integer_array(
        "landmark_documents", landmark_documents, "[B, m]", landmarks.shape[:2]
    )
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(q)
    )
    arrays = (q, landmarks, v, key_mask, documents, landmark_documents)
    if implementation == "reference":
        o, residual = reference.gaussian_attention(*arrays, **options)
    else:
        o, residual = run(
            OP,
            implementation,
            *arrays,
            layouts=("BTHK", "BmHK", "BTHV", "BT", "BT", "Bm"),
            outputs=("BTHV", "BH"),
            dtypes=(v.dtype, jnp.dtype(jnp.float32)),
            **options,
        )
    return o.astype(v.dtype), jax.lax.stop_gradient(jnp.maximum(residual, LEAST_RESIDUAL))
