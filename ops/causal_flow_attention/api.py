"""Causal flow attention: the public function and its state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..framework import platforms
from ..framework.arguments import (
    attention_arrays,
    check_shape,
    checked_segment_ids,
    choice,
    flag,
    floats,
    integer_array,
    number,
)
from . import reference, xla

# exp(-2 clip) is the least share of a source there is; float32 has none below e^-87.
LARGEST_CLIP = 40.0


class FlowState(NamedTuple):
    """Sums over the tokens of a segment, q and k for phi(q) and phi(k).

    tokens: [B] int32, their number.
    keys, queries: [B, H, K], of k_j and of q_i.
    keys_out: [B, H, K], of k_j j / O_j.
    queries_in: [B, H, K], of q_i i / I_i.
    shares: [B, H], of exp(clip(Ohat_j) - clip).
    memory: [B, H, K, V], of k_j^T c_j v_j."""

    tokens: jax.Array
    keys: jax.Array
    queries: jax.Array
    keys_out: jax.Array
    queries_in: jax.Array
    shares: jax.Array
    memory: jax.Array


def init_flow_state(batch: int, heads: int, key_size: int, value_size: int) -> FlowState:
    """The state before the first token: zeros."""
    vector = jnp.zeros((batch, heads, key_size), jnp.float32)
    return FlowState(
        tokens=jnp.zeros((batch,), jnp.int32),
        keys=vector,
        queries=vector,
        keys_out=vector,
        queries_in=vector,
        shares=jnp.zeros((batch, heads), jnp.float32),
        memory=jnp.zeros((batch, heads, key_size, value_size), jnp.float32),
    )


def causal_flow_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: str = "sigmoid",
    competition: bool = True,
    allocation: bool = True,
    clip: float = 1.0,
    eps: float = 1e-6,
    initial_state: FlowState | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, FlowState]:
    """Flow attention of each token, a sink and a source, to itself and the tokens before it.

        I_t = q_t sum_{j<=t} k_j                        O_t = k_t sum_{i<=t} q_i
        Ihat_t = q_t sum_{j<=t} k_j j / O_j / t         Ohat_t = k_t sum_{i<=t} q_i i / I_i / t
        c_t = t exp(clip(Ohat_t)) / sum_{j<=t} exp(clip(Ohat_j))
        o_t = sigmoid(Ihat_t) (q_t / I_t) sum_{j<=t} k_j^T c_j v_j

    with q and k for phi(q) and phi(k) (Wu et al., Flowformer, ICML 2022, arXiv 2202.06258, Eq. 9
    and the released code). What a token sends out and its weight c_t are those of its own time, so
    that the last token is not that of `flow_attention`. The authors' language model clips Ohat to
    [-5, 5]. It is made of `gated_linear_attention` without decay.

    Args:
      q, k: [B, T, H, K], any T >= 1.
      v: [B, T, H, V].
      feature_map: phi, "sigmoid", "relu", which is relu + 1e-6, or "identity" for q and k that are
        positive already.
      competition: whether c weighs the sources; if not it is 1.
      allocation: whether the sigmoid weighs the sinks; if not it is 1.
      clip: Ohat is cut to [-clip, clip]; above 0 and at most 40.
      eps: what is added to every component of both factors of the first four products, >= 0.
      initial_state: the `FlowState` before the first token; None means `init_flow_state`. It
        belongs to the first token's segment.
      segment_ids: [B, T] integers, compared for equality with the previous token's only: where the
        id changes all sums start from zero. None means one segment.
      reverse: whether to walk from the last token to the first. `initial_state` is then the state
        after the last token, the returned state the one before the first.
      implementation: "reference" (a scan over tokens), "xla" (plain JAX on every backend), or None:
        "xla" with the kernels of `gated_linear_attention` for the sum of K x V where the platform
        has them. A named implementation runs or raises.

    Returns:
      o [B, T, H, V] in v's dtype, and the `FlowState` after the last token. All is computed in
      float32. Differentiable in every float input, and through both outputs; only the inputs are
      kept for the backward pass.

    Raises:
      ValueError: for wrong ranks, shapes, dtypes and names while tracing.
    """
    q, k, v = attention_arrays(q, k, v, same_length=True)
    batch, _, heads, key_size = q.shape
    if k.shape[2] != heads:
        raise ValueError(f"k must have as many heads as q, {heads}; got {k.shape[2]}")
    expectation = f"a number > 0 and <= {LARGEST_CLIP:g}"
    options = {
        "feature_map": choice("feature_map", feature_map, tuple(reference.FEATURE_MAPS)),
        "competition": flag("competition", competition),
        "allocation": flag("allocation", allocation),
        "clip": number("clip", clip, expectation, lambda x: 0 < x <= LARGEST_CLIP),
        "eps": number("eps", eps, "a number >= 0", lambda x: x >= 0),
        "reverse": flag("reverse", reverse),
    }
    segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    state = init_flow_state(batch, heads, key_size, v.shape[3])
    if initial_state is not None:
        state = _checked_state(initial_state, state)
    implementation = platforms.checked_implementation(
        "causal_flow_attention", implementation, {"xla": xla}, len(q)
    )
    arrays = (q, k, v, tuple(state), segment_ids)
    if implementation == "reference":
        o, last = reference.causal_flow_attention(*arrays, **options)
    else:
        o, last = xla.causal_flow_attention(*arrays, implementation=implementation, **options)
    return o.astype(v.dtype), FlowState(*last)


def _checked_state(state: FlowState, zeros: FlowState) -> FlowState:
    if not isinstance(state, FlowState):
        raise ValueError(
            f"initial_state must be a FlowState (see init_flow_state); got {type(state).__name__}"
        )
    tokens = integer_array("initial_state.tokens", state.tokens, "[B]", zeros.tokens.shape)
    layouts = (*("[B, H, K]",) * 4, "[B, H]", "[B, H, K, V]")
    sums = floats(**{f"initial_state.{name}": getattr(state, name) for name in state._fields[1:]})
    for name, layout, value, zero in zip(state._fields[1:], layouts, sums, zeros[1:], strict=True):
        check_shape(f"initial_state.{name}", value, layout, zero.shape)
    return FlowState(tokens, *(x.astype(jnp.float32) for x in sums))
