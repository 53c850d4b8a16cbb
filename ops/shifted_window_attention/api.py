"""Attention within windows of a grid, shifted or not: the public function."""

import math

import jax

from ..framework import platforms
from ..framework.arguments import (
    attention_arrays,
    check_shape,
    checked_segment_ids,
    floats,
    mask_array,
    scale_of,
)
from ..framework.grid import check_grid, check_sizes
from ..framework.op import Op, run
from . import reference, xla

OP = Op("shifted_window_attention", {"xla": xla})


def shifted_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...] | None = None,
    scale: float | None = None,
    bias: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each token to those of its window, of a grid that is cut into windows.

        o_t = sum_s p_ts v_s        p_t = softmax_s(scale q_t k_s + bias)

    (Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030, section 3.2.) With a shift, windows
    start that many tokens later in each dimension; the tokens before them and those behind the last
    whole window are two parts that do not see each other, though the bias counts them as one
    window. No matrix of T x T is formed: memory grows with T times the tokens of a window.

    Args:
      q: [B, T, H, K], tokens in raster order, the last dimension of the grid fastest.
      k: [B, T, HK, K]. HK divides H; query head h reads key and value head h // (H / HK).
      v: [B, T, HK, V].
      grid: extents of 1 to 3 dimensions, T their product.
      window: its size in each dimension, which divides that of the grid.
      shift: in each dimension, at least 0 and less than the window; None means no shift.
      scale: factor on the logits; None means K**-0.5.
      bias: [H, W, W] for the W tokens of a window in raster order, on the scaled logits; None means
        none.
      key_mask: [B, T] bool, the keys that there are; None means all. What stands in the others
        changes nothing.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: a token
        sees those of its window in the run of equal ids that it is in. None means one segment.
      implementation: "reference" (one mask of T x T), "xla" (windows as a batch for
        `jax.nn.dot_product_attention`), or None for "xla". A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, zeros where no key is there. All is computed in float32.
      Differentiable in q, k, v and bias; only the inputs are kept for the backward pass. On a mesh
      that cuts time each device gathers all of it.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a grid that does
        not have T tokens or that windows do not divide.
    """
    q, k, v = attention_arrays(q, k, v, same_length=True)
    grid = check_grid(grid, q.shape[1])
    sizes = f"{len(grid)} integers, one for each dimension of grid {grid},"
    check_sizes("window", window, f"{sizes} >= 1", len(grid), 1)
    if any(extent % size for extent, size in zip(grid, window, strict=True)):
        raise ValueError(f"window must divide grid {grid} in each dimension; got {tuple(window)}")
    shift = (0,) * len(grid) if shift is None else shift
    check_sizes("shift", shift, f"{sizes} >= 0", len(grid), 0)
    if any(by >= size for by, size in zip(shift, window, strict=True)):
        raise ValueError(
            f"shift must be less than window {tuple(window)} in each dimension; got {tuple(shift)}"
        )
    (bias,) = floats(bias=bias)
    if bias is not None:
        tokens = math.prod(window)
        check_shape("bias", bias, "[H, W, W]", (q.shape[2], tokens, tokens))
    key_mask = mask_array("key_mask", key_mask, *k.shape[:2])
    segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    options = {
        "grid": grid,
        "window": tuple(window),
        "shift": tuple(shift),
        "scale": scale_of(scale, q.shape[3]),
    }
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, len(q)
    )
    arrays = (q, k, v, bias, key_mask, segment_ids)
    if implementation == "reference":
        return reference.shifted_window_attention(*arrays, **options).astype(v.dtype)
    (o,) = run(
        OP,
        implementation,
        *arrays,
        layouts=("BLHK", "BLGK", "BLGV", "" if bias is None else "HWW", "BL", "BL"),
        outputs=("BLHV",),
        dtypes=(v.dtype,),
        **options,
    )
    return o
