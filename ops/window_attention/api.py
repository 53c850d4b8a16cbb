"""Sliding-window attention: the public function and its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..framework import platforms
from ..framework.arguments import (
    check_finite,
    check_shape,
    checked_segment_ids,
    floats,
    integer,
    scale_of,
)
from ..framework.op import Op, run
from . import pallas_tpu, reference, sequence_parallel, xla

ACTIVATIONS = ("softmax", "squared_relu")

OP = Op("window_attention", {"xla": xla, "pallas_tpu": pallas_tpu}, sequence_parallel.RULES)


class WindowState(NamedTuple):
    """The last P <= window - 1 tokens, oldest first.

    k: [B, P, HK, K], keys.
    v: [B, P, HK, V], values.
    valid: [B, P] bool, whether the token is there: it exists, and lies in the segment that the
      state belongs to."""

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
    """The state before the first token, of P = window - 1 tokens: nothing is there. `heads` counts
    key heads."""
    return WindowState(
        k=jnp.zeros((batch, window - 1, heads, key_size), dtype),
        v=jnp.zeros((batch, window - 1, heads, value_size), dtype),
        valid=jnp.zeros((batch, window - 1), bool),
    )


def pad_window_state(state: WindowState, window: int) -> WindowState:
    """The state with P = window - 1, a size that no call changes: tokens that are not there come
    first."""
    missing = max(0, window - 1 - state.valid.shape[1])
    return WindowState(
        *(jnp.pad(x, ((0, 0), (missing, 0)) + ((0, 0),) * (x.ndim - 2)) for x in state)
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
      window: tokens that a query sees, itself included; any window >= 1. One longer than the
        tokens that there are costs no more than they do.
      scale: factor on q; None means K**-0.5.
      activation: "softmax", or "squared_relu", whose weights have no sum to be divided by; FLASH
        makes `scale` one over the number of tokens.
      initial_state: the `WindowState` before the first token, of any P <= window - 1; None means
        no tokens. It belongs to the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes a segment starts. None means one segment. What is not finite stays in its segment
        with "reference"; else it may reach tokens of others that lie no further than twice the
        window away, or 64 tokens, or the window and 512 more if that is above 1,024. `ops.checks`
        finds it.
      implementation: "reference" (one softmax over all keys), "xla" (blocks of queries in plain
        JAX), "pallas_tpu" (JAX's splash attention; softmax, bfloat16, at least 128 tokens;
        interpreted when lowered for a CPU), or None for the best of the platform that the program
        is lowered for: the kernel on TPU where it can, else "xla". A named implementation runs or
        raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the `WindowState` of the last min(window - 1, P + T) tokens,
      its keys and values in k's and v's dtypes, zeros where not valid. Logits, softmax and sums are
      float32 whatever the inputs are; the kernel rounds the factors of matmuls to bfloat16.
      Differentiable in q, k, v and the state's keys and values, and through both outputs. Only the
      inputs are kept for the backward pass; "xla" has the logits of T * window pairs beside them,
      of 512 * window where the window is above 1,024.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes, windows and names while tracing.
    """
    q, k, v = floats(q=q, k=k, v=v)
    check_shape("q", q, "[B, T, H, K]", (None,) * 4)
    batch, length, heads, key_size = q.shape
    if 0 in (length, heads, key_size):
        raise ValueError(f"q must have T, H and K of at least 1; got {q.shape}")
    check_shape("k", k, "[B, T, HK, K] with B, T and K of q", (batch, length, None, key_size))
    key_heads = k.shape[2]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"k must have a number of heads that divides q's {heads}; got {key_heads}")
    check_shape("v", v, "[B, T, HK, V] with B, T and HK of k", (batch, length, key_heads, None))
    window = integer("window", window, 1, ", the token itself included")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}"
        )
    past = 0
    if initial_state is not None:
        initial_state = _checked_state(initial_state, window, (batch, key_heads), k, v)
        past = initial_state.valid.shape[1]
    # More than all tokens, and a state that has room for them, is not needed.
    window = min(window, past + length + 1)
    if initial_state is not None:
        initial_state = pad_window_state(initial_state, window)
    segment_ids = checked_segment_ids(segment_ids, batch, length)
    scale = scale_of(scale, key_size)
    implementation = platforms.checked_implementation(
        OP.name, implementation, OP.implementations, batch
    )
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
    o = o.astype(v.dtype)
    check_finite(segment_ids, o=o)
    return o, WindowState(*state)


def _checked_state(
    state: Any, window: int, sizes: tuple[int, int], k: jax.Array, v: jax.Array
) -> WindowState:
    """The state as JAX arrays; sizes: batch and key heads."""
    if not isinstance(state, WindowState):
        raise ValueError(
            "initial_state must be a WindowState (see init_window_state); got"
            f" {type(state).__name__}"
        )
    k_past, v_past = floats(**{"initial_state.k": state.k, "initial_state.v": state.v})
    if jnp.result_type(state.valid) != jnp.bool_:
        raise ValueError(f"initial_state.valid must be boolean; got {jnp.result_type(state.valid)}")
    valid, (batch, key_heads) = jnp.asarray(state.valid), sizes
    check_shape("initial_state.valid", valid, "[B, P]", (batch, None))
    past = valid.shape[1]
    if past >= window:
        raise ValueError(
            f"initial_state must have at most window - 1 = {window - 1} tokens; got {past}"
        )
    check_shape("initial_state.k", k_past, "[B, P, HK, K]", (batch, past, key_heads, k.shape[3]))
    check_shape("initial_state.v", v_past, "[B, P, HK, V]", (batch, past, key_heads, v.shape[3]))
    return WindowState(k_past, v_past, valid)
