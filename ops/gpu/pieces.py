"""Long sequences, one piece of time after another: memory between kernels is that of one piece.

The kernels of the delta rule, and all kernels with a decay for each channel, pass scores, keys,
queries and values of every token to each other through memory. A call of more than MAX_TOKENS
tokens times heads runs them on pieces of fewer tokens, each from the final state of the piece
before. Backward first passes the state over the pieces and keeps the states at their starts; then
it takes the pieces from last to first. The price is one more pass over the states, and a copy of
each piece."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Tokens times heads of a piece. With K = V = 128 in bfloat16 a piece needs, beside the whole inputs
# and outputs, 3 GB (delta rule, forward) to 13 GB (backward, a decay for each channel); its 32,768
# chunks are work for any GPU. Not measured.
MAX_TOKENS = 1 << 21

# The inputs of a rule: q, k, v and others, [B, T, ..], or without time [H], or None.
Tokens = Sequence[Any]


def forward(
    rule: Callable[..., Any],
    tokens: Tokens,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, V] in v's dtype and the final state, as
    `rule(*tokens, initial_state, segment_ids)` returns them for one piece."""
    length = _piece_length(tokens)
    count, rest = _pieces(tokens, length)
    if count == 0:
        return rule(*tokens, initial_state, segment_ids)

    def step(start: Any, size: int, carry: Any) -> Any:
        o, S = carry
        S = _reset(S, segment_ids, start)
        piece_o, S = rule(*_cut(tokens, start, size), S, *_cut([segment_ids], start, size))
        return lax.dynamic_update_slice_in_dim(o, piece_o, start, 1), S

    carry = jnp.zeros_like(tokens[2]), initial_state.astype(jnp.float32)
    carry = lax.fori_loop(0, count, lambda i, carry: step(i * length, length, carry), carry)
    return step(count * length, rest, carry) if rest else carry


def backward(
    rule: Callable[..., Any],
    final_state: Callable[..., jax.Array],
    tokens: Tokens,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    do: jax.Array,
    dfinal_state: jax.Array,
) -> tuple[Any, ...]:
    """The gradients of the tokens and of the initial state, as
    `rule(*tokens, initial_state, segment_ids, do, dfinal_state)` returns them for one piece.

    final_state(*tokens, initial_state, segment_ids): the state that `forward` leaves."""
    length = _piece_length(tokens)
    count, rest = _pieces(tokens, length)
    if count == 0:
        return rule(*tokens, initial_state, segment_ids, do, dfinal_state)

    def pass_state(S: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = i * length
        S = _reset(S, segment_ids, start)
        piece = _cut(tokens, start, length), _cut([segment_ids], start, length)
        return final_state(*piece[0], S, *piece[1]), S

    # The state before the rest, and the states before the pieces.
    state, starts = lax.scan(pass_state, initial_state.astype(jnp.float32), jnp.arange(count))

    def piece_gradients(start: Any, size: int, S: jax.Array, dS: jax.Array) -> Any:
        piece, ids = _cut(tokens, start, size), _cut([segment_ids], start, size)
        *gradients, dS = rule(*piece, S, *ids, *_cut([do], start, size), dS)
        return gradients, _reset(dS, segment_ids, start)

    def step(start: Any, size: int, S: jax.Array, carry: Any) -> Any:
        gradients, dS = carry
        piece, dS = piece_gradients(start, size, S, dS)
        whole = [
            _put(x, gradient, piece_gradient, start)
            for x, gradient, piece_gradient in zip(tokens, gradients, piece, strict=True)
        ]
        return whole, dS

    shapes, _ = jax.eval_shape(
        lambda S, dS: piece_gradients(0, length, S, dS), initial_state, initial_state
    )
    zeros = [
        None if x is None else jnp.zeros(x.shape, like.dtype)
        for x, like in zip(tokens, shapes, strict=True)
    ]
    carry = zeros, dfinal_state.astype(jnp.float32)
    if rest:
        state = _reset(state, segment_ids, count * length)
        carry = step(count * length, rest, state, carry)

    def step_back(i: Any, carry: Any) -> Any:
        n = count - 1 - i
        return step(n * length, length, starts[n], carry)

    gradients, dstate = lax.fori_loop(0, count, step_back, carry)
    return *gradients, dstate


def _piece_length(tokens: Tokens) -> int:
    """The tokens of a piece: a power of two, at least a chunk."""
    batch, _, heads, _ = tokens[2].shape
    return 1 << max(64, MAX_TOKENS // (batch * heads)).bit_length() - 1


def _pieces(tokens: Tokens, length: int) -> tuple[int, int]:
    """The number of pieces, and of tokens after them; (0, T) where one piece is enough."""
    whole = tokens[2].shape[1]
    return (0, whole) if whole <= length else divmod(whole, length)


def _cut(tokens: Tokens, start: Any, size: int) -> list[jax.Array | None]:
    """The piece of `size` tokens from `start` on."""
    return [
        x if x is None or x.ndim == 1 else lax.dynamic_slice_in_dim(x, start, size, axis=1)
        for x in tokens
    ]


def _put(x: Any, gradient: Any, piece: Any, start: Any) -> Any:
    """The gradient of x with that of a piece in its place, or added where x has no time."""
    if x is None:
        return None
    if x.ndim < 3:
        return gradient + piece
    return lax.dynamic_update_slice_in_dim(gradient, piece, start, 1)


def _reset(S: jax.Array, segment_ids: jax.Array | None, start: Any) -> jax.Array:
    """S [B, H, K, V], or zero where a segment starts with token `start`, the first excepted."""
    if segment_ids is None:
        return S
    keep = segment_ids[:, jnp.maximum(start - 1, 0)] == segment_ids[:, start]
    return jnp.where(keep[:, None, None, None], S, 0.0)
