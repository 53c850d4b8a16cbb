"""Long sequences, one piece of time after another: memory between kernels is that of one piece.

The kernels of the delta rule, and all kernels with a decay for each channel, pass scores, keys,
queries and values of every token to each other through memory. A call of more than MAX_TOKENS
tokens times heads runs them on pieces of fewer tokens, each from the final state of the piece
before. Backward first passes the state over the pieces and keeps the states at their starts; then
it takes the pieces from last to first. The price is one more pass over the states, and a copy of
each piece."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, V] in v's dtype and the final state, as
    `rule(*tokens, initial_state, segment_ids)` returns them for one piece.

    reverse: the first piece is that of the last tokens."""
    length = _piece_length(tokens)
    count, rest = _pieces(tokens, length)
    if count == 0:
        return rule(*tokens, initial_state, segment_ids)

    def step(start: Any, size: int, carry: Any) -> Any:
        o, S = carry
        piece = _Piece(start, size, tokens[2].shape[1], reverse)
        S = piece.reset(S, segment_ids)
        piece_o, S = rule(*piece.cut(tokens), S, *piece.cut([segment_ids]))
        return piece.put(o, piece_o), S

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
    reverse: bool,
) -> tuple[Any, ...]:
    """The gradients of the tokens and of the initial state, as
    `rule(*tokens, initial_state, segment_ids, do, dfinal_state)` returns them for one piece.

    final_state(*tokens, initial_state, segment_ids): the state that `forward` leaves."""
    length = _piece_length(tokens)
    count, rest = _pieces(tokens, length)
    if count == 0:
        return rule(*tokens, initial_state, segment_ids, do, dfinal_state)

    def pass_state(S: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        piece = _Piece(i * length, length, tokens[2].shape[1], reverse)
        S = piece.reset(S, segment_ids)
        return final_state(*piece.cut(tokens), S, *piece.cut([segment_ids])), S

    # The state before the rest, and the states before the pieces.
    state, starts = lax.scan(pass_state, initial_state.astype(jnp.float32), jnp.arange(count))

    def piece_gradients(piece: _Piece, S: jax.Array, dS: jax.Array) -> Any:
        ids = piece.cut([segment_ids])
        *gradients, dS = rule(*piece.cut(tokens), S, *ids, *piece.cut([do]), dS)
        return gradients, piece.reset(dS, segment_ids)

    def step(start: Any, size: int, S: jax.Array, carry: Any) -> Any:
        gradients, dS = carry
        piece = _Piece(start, size, tokens[2].shape[1], reverse)
        of_piece, dS = piece_gradients(piece, S, dS)
        whole = [
            # What has no time, such as a constant decay, has a sum over the pieces.
            gradient + part if x is not None and x.ndim < 3 else piece.put(gradient, part)
            for x, gradient, part in zip(tokens, gradients, of_piece, strict=True)
        ]
        return whole, dS

    first = _Piece(0, length, tokens[2].shape[1], reverse)
    shapes, _ = jax.eval_shape(
        lambda S, dS: piece_gradients(first, S, dS), initial_state, initial_state
    )
    zeros = [
        None if x is None else jnp.zeros(x.shape, like.dtype)
        for x, like in zip(tokens, shapes, strict=True)
    ]
    carry = zeros, dfinal_state.astype(jnp.float32)
    if rest:
        piece = _Piece(count * length, rest, tokens[2].shape[1], reverse)
        state = piece.reset(state, segment_ids)
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


class _Piece(NamedTuple):
    """A piece of time, counted in walking order."""

    start: Any
    size: int
    length: int  # of the sequence
    reverse: bool

    @property
    def first(self) -> Any:
        """Its first element in an array."""
        return self.length - self.start - self.size if self.reverse else self.start

    def cut(self, tokens: Tokens) -> list[jax.Array | None]:
        """The piece of arrays [B, T, ..]; what has no time as it is."""
        return [
            x
            if x is None or x.ndim == 1
            else lax.dynamic_slice_in_dim(x, self.first, self.size, axis=1)
            for x in tokens
        ]

    def put(self, whole: Any, piece: Any) -> Any:
        """The array [B, T, ..] with the piece in its place."""
        if whole is None:
            return None
        return lax.dynamic_update_slice_in_dim(whole, piece, self.first, 1)

    def reset(self, S: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """S [B, H, K, V], or zero where a segment starts with the piece; the first piece continues
        the initial state."""
        if segment_ids is None:
            return S
        before, token = jnp.maximum(self.start - 1, 0), self.start
        if self.reverse:
            before, token = self.length - 1 - before, self.length - 1 - token
        keep = segment_ids[:, before] == segment_ids[:, token]
        return jnp.where(keep[:, None, None, None], S, 0.0)
