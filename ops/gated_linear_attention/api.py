"""Gated linear attention: the public function."""

import functools

import jax
import jax.numpy as jnp

from .. import dispatch
from ..arguments import check_float, check_segment_ids, check_shape, check_values, finite
from ..dispatch import cast_like
from . import chunked, reference

IMPLEMENTATIONS = {"chunked": chunked}


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention whose matrix state decays: not at all, by head, by token, or by token and channel.

        S_t = Diag(exp(decay_log_t)) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

    Linear attention (Katharopoulos et al., 2020), RetNet, Lightning Attention, GLA (Yang et al., 2024, eq. 3), HGRN2 and the
    SSD form of Mamba-2 are this recurrence with different `decay_log`.

    Args:
      q, k: [B, T, HK, K], any T >= 1. HK divides H; value head h reads key head h // (H / HK).
      v: [B, T, H, V].
      decay_log: natural log of the decay, finite and <= 0. None: no decay. [H]: constant per head. [B, T, H]: per token.
        [B, T, H, K]: per token and key channel.
      scale: factor on q; None means K**-0.5.
      initial_state: [B, H, K, V], the state before the first token; None means zeros. It belongs to the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the id changes the state starts
        from zero. None means one segment.
      implementation: "reference" (a scan over tokens), "chunked" (plain JAX), or None for the best of the platform that the
        program is lowered for. A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the state after the last token [B, H, K, V] in float32. The state and all sums are float32
      whatever the inputs are, no exponent is positive and none is clipped. Differentiable in every float input, and through
      both outputs; memory beyond inputs and outputs grows with T / 64 states, not with T states.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing, and for a positive or non-finite `decay_log` where
        values can be seen (an eager call, or under `ops.checks`).
    """
    check_float(q=q, k=k, v=v, decay_log=decay_log, initial_state=initial_state)
    check_shape("q", q, "[B, T, HK, K]", (None,) * 4)
    batch, length, key_heads, key_size = q.shape
    if length == 0 or key_size == 0:
        raise ValueError(f"q must have T >= 1 and K >= 1; got {q.shape}")
    check_shape("k", k, "[B, T, HK, K] like q", q.shape)
    check_shape("v", v, "[B, T, H, V] with B and T of q", (batch, length, None, None))
    heads, value_size = v.shape[2:]
    if heads == 0 or heads % key_heads:
        raise ValueError(f"v must have a multiple of q's {key_heads} heads; got {heads}")
    if decay_log is not None:
        layouts = {1: "[H]", 3: "[B, T, H]", 4: "[B, T, H, K]"}
        shape = {1: (heads,), 3: (batch, length, heads), 4: (batch, length, heads, key_size)}.get(decay_log.ndim)
        if shape is None:
            raise ValueError(f"decay_log must be {', '.join(layouts.values())} or None; got {decay_log.shape}")
        check_shape("decay_log", decay_log, layouts[decay_log.ndim], shape)
    if initial_state is not None:
        check_shape("initial_state", initial_state, "[B, H, K, V]", (batch, heads, key_size, value_size))
    check_segment_ids(segment_ids, batch, length)
    check_values("decay_log", decay_log, "finite and <= 0", lambda x: (x <= 0) & finite(x))
    dispatch.check_implementation("gated_linear_attention", implementation, IMPLEMENTATIONS)

    scale = key_size**-0.5 if scale is None else float(scale)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_size, value_size), jnp.float32)
    if implementation == "reference":
        o, state = reference.gated_linear_attention(q, k, v, decay_log, scale, initial_state, segment_ids)
    else:
        o, state = _recurrence(scale, implementation, q, k, v, decay_log, initial_state, segment_ids)
    return o.astype(v.dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(scale, implementation, *inputs):
    return dispatch.call(IMPLEMENTATIONS, "forward", implementation, *inputs, scale=scale)


def _forward(scale, implementation, *inputs):
    return _recurrence(scale, implementation, *inputs), inputs


def _backward(scale, implementation, inputs, cotangents):
    gradients = dispatch.call(IMPLEMENTATIONS, "backward", implementation, *inputs, *cotangents, scale=scale)
    return *cast_like(gradients, inputs[:-1]), None  # segment_ids are integers


_recurrence.defvjp(_forward, _backward)
