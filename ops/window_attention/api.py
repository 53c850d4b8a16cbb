"""Sliding-window attention: the public function and its state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..framework import platforms
from ..framework.arguments import check_float, check_segment_ids, check_shape
from ..framework.op import Op, run
from . import pallas_tpu, reference, sequence_parallel, xla

ACTIVATIONS = ("softmax", "squared_relu")

OP = Op("window_attention", {"xla": xla, "pallas_tpu": pallas_tpu}, sequence_parallel.RULES)


class WindowState(NamedTuple):
    """The last window - 1 tokens, oldest first.

    k: [B, window - 1, HK, K], keys.
    v: [B, window - 1, HK, V], values.
    valid: [B, window - 1] bool, whether the token is there: it exists, and lies in the segment that
      the state belongs to."""

    k: jax.Array
    v: jax.Array
    valid: jax.Array


def init_window_state(
    batch: int,
    window: int,
    heads: int,
    key_size: int,
    value_size: int,
    dtype: DTypeLike = jnp.float32,
) -> WindowState:
    """The state before the first token: nothing is there. `heads` counts key heads."""
    return WindowState(
        k=jnp.zeros((batch, window - 1, heads, key_size), dtype),
        v=jnp.zeros((batch, window - 1, heads, value_size), dtype),
        valid=jnp.zeros((batch, window - 1), bool),
    )


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    scale: float | None = None,
    activation: str = "softmax",
    initial_state: WindowState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, WindowState]:
    """Attention of each token to itself and the window - 1 tokens before it that are in its
    segment.

        o_t = sum_s p_ts v_s   over t - window < s <= t in the segment of t
        p_t = softmax(scale q_t k_s)   or   p_ts = max(scale q_t k_s, 0)^2

    (Beltagy et al., Longformer, 2020, arXiv 2004.05150, causal and without dilation or global
    tokens; squares: Hua et al., FLASH, ICML 2022, arXiv 2202.10447.)

    Args:
      q: [B, T, H, K], any T >= 1.
      k: [B, T, HK, K]. HK divides H; query head h reads key and value head h // (H / HK).
      v: [B, T, HK, V].
      window: tokens that a query sees, itself included; any window >= 1, also longer than T.
      scale: factor on q; None means K**-0.5.
      activation: "softmax", or "squared_relu", whose weights have no sum to be divided by; FLASH
        makes `scale` one over the number of tokens.
      initial_state: the `WindowState` before the first token; None means `init_window_state`, no
        tokens. It belongs to the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes a segment starts. None means one segment.
      implementation: "reference" (one softmax over all keys), "xla" (blocks of queries in plain
        JAX), "pallas_tpu" (JAX's splash attention; softmax, bfloat16, at least 128 tokens;
        interpreted when lowered for a CPU), or None for the best of the platform that the program
        is lowered for: the kernel on TPU where it can, else "xla". A named implementation runs or
        raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the `WindowState` after the last token, its keys and values
      in k's and v's dtypes, zeros where not valid. Logits, softmax and sums are float32 whatever
      the inputs are; the kernel rounds the factors of matmuls to bfloat16. Differentiable in q, k,
      v and the state's keys and values, and through both outputs. Only the inputs are kept for the
      backward pass; "xla" has the logits of T * window pairs beside them, of 512 * window where the
      window is above 1,024.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes, windows and names while tracing.
    """
    check_float(q=q, k=k, v=v)
    check_shape("q", q, "[B, T, H, K]", (None,) * 4)
    batch, length, heads, key_size = q.shape
    if length == 0 or key_size == 0:
        raise ValueError(f"q must have T >= 1 and K >= 1; got {q.shape}")
    check_shape("k", k, "[B, T, HK, K] with B, T and K of q", (batch, length, None, key_size))
    key_heads = k.shape[2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"k must have a number of heads that divides q's {heads}; got {key_heads}")
    check_shape("v", v, "[B, T, HK, V] with B, T and HK of k", (batch, length, key_heads, None))
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"window must be an integer >= 1, the token itself included; got {window!r}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}"
        )
    if initial_state is not None:
        _check_state(initial_state, (batch, window - 1, key_heads), key_size, v.shape[3])
    check_segment_ids(segment_ids, batch, length)
    platforms.check_implementation(OP.name, implementation, OP.implementations)

    scale = key_size**-0.5 if scale is None else float(scale)
    if implementation == "reference":
        past = initial_state or init_window_state(batch, window, key_heads, key_size, v.shape[3])
        o, *state = reference.window_attention(
            q, k, v, *past, segment_ids, window, scale, activation
        )
    else:
        past = initial_state or (None, None, None)
        o, *state = run(
            OP,
            implementation,
            q,
            k,
            v,
            *past,
            segment_ids,
            layouts=("BTHK", "BTGK", "BTGV", "BWGK", "BWGV", "BW", "BT"),
            outputs=("BTHV", "BWGK", "BWGV", "BW"),
            dtypes=(v.dtype, k.dtype, v.dtype, jnp.dtype(bool)),
            window=window,
            scale=scale,
            activation=activation,
        )
    return o.astype(v.dtype), WindowState(*state)


def _check_state(
    state: WindowState, shape: tuple[int, int, int], key_size: int, value_size: int
) -> None:
    if not isinstance(state, WindowState):
        raise ValueError(
            "initial_state must be a WindowState (see init_window_state); got"
            f" {type(state).__name__}"
        )
    check_float(**{"initial_state.k": state.k, "initial_state.v": state.v})
    check_shape("initial_state.k", state.k, "[B, window - 1, HK, K]", (*shape, key_size))
    check_shape("initial_state.v", state.v, "[B, window - 1, HK, V]", (*shape, value_size))
    check_shape("initial_state.valid", state.valid, "[B, window - 1]", shape[:2])
    if jnp.result_type(state.valid) != jnp.bool_:
        raise ValueError(f"initial_state.valid must be boolean; got {jnp.result_type(state.valid)}")
