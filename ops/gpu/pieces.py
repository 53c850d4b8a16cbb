"""Long sequences on GPU one piece of time after another, so that memory between kernels is that of
a piece.

The kernels of the delta rule, and all with a decay per channel, hand each other scores and keys,
queries and values that they made of every token, through memory. In a call of more than MOST tokens
x heads they run on pieces of fewer, each from the state that the one before left. Backward first
passes the state over the pieces, and keeps those at their starts; then it takes the pieces from
last to first. That is one more pass over the states, and a copy of each piece, for memory that does
not grow with the sequence."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# With K = V = 128 in bfloat16 a piece needs, beside the whole inputs and outputs, 3 GB (delta rule,
# forward) to 13 GB (backward, decays per channel); its 32,768 chunks are work for any GPU. Not
# measured.
MOST = 1 << 21

# The inputs of a rule: q, k, v and others, [B, T, ..], or without time [H], or None.
Tokens = Sequence[Any]


def forward(
    rule: Callable[..., Any], tokens: Tokens, state: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What `rule(*tokens, state, segment_ids)` gives, o [B, T, H, V] in v's dtype and the final
    state."""
    full, rest = _pieces(tokens)
    if not full:
        return rule(*tokens, state, segment_ids)
    piece = _length(tokens)

    def step(start: Any, size: int, carry: Any) -> Any:
        o, S = carry
        S = _continued(S, segment_ids, start)
        of_piece, S = rule(*_cut(tokens, start, size), S, *_cut([segment_ids], start, size))
        return lax.dynamic_update_slice_in_dim(o, of_piece, start, 1), S

    carry = jnp.zeros_like(tokens[2]), state.astype(jnp.float32)
    carry = lax.fori_loop(0, full, lambda i, x: step(i * piece, piece, x), carry)
    return step(full * piece, rest, carry) if rest else carry


def backward(
    rule: Callable[..., Any],
    final_state: Callable[..., jax.Array],
    tokens: Tokens,
    state: jax.Array,
    segment_ids: jax.Array | None,
    do: jax.Array,
    dfinal_state: jax.Array,
) -> tuple[Any, ...]:
    """What `rule(*tokens, state, segment_ids, do, dfinal_state)` gives, the gradients of tokens and
    state.

    final_state(*tokens, state, segment_ids): the state that `forward` leaves.
    """
    full, rest = _pieces(tokens)
    if not full:
        return rule(*tokens, state, segment_ids, do, dfinal_state)
    piece = _length(tokens)

    def pass_state(S: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        cut = functools.partial(_cut, start=i * piece, size=piece)
        S = _continued(S, segment_ids, i * piece)
        return final_state(*cut(tokens), S, *cut([segment_ids])), S

    last, starts = lax.scan(pass_state, state.astype(jnp.float32), jnp.arange(full))

    def of_piece(start: Any, size: int, S: jax.Array, dS: jax.Array) -> Any:
        cut = functools.partial(_cut, start=start, size=size)
        *gradients, dS = rule(*cut(tokens), S, *cut([segment_ids]), *cut([do]), dS)
        return gradients, _continued(dS, segment_ids, start)

    def step(start: Any, size: int, S: jax.Array, carry: Any) -> Any:
        gradients, dS = carry
        of_tokens, dS = of_piece(start, size, S, dS)
        return [
            whole
            if whole is None
            else whole + part
            if x.ndim < 3
            else lax.dynamic_update_slice_in_dim(whole, part, start, 1)
            for x, whole, part in zip(tokens, gradients, of_tokens, strict=True)
        ], dS

    shapes, _ = jax.eval_shape(lambda S, dS: of_piece(0, piece, S, dS), state, state)
    zeros = [
        None if x is None else jnp.zeros(x.shape, like.dtype)
        for x, like in zip(tokens, shapes, strict=True)
    ]
    carry = zeros, dfinal_state.astype(jnp.float32)
    if rest:
        last = _continued(last, segment_ids, full * piece)
        carry = step(full * piece, rest, last, carry)

    def step_back(i: Any, carry: Any) -> Any:
        n = full - 1 - i
        return step(n * piece, piece, starts[n], carry)

    gradients, dstate = lax.fori_loop(0, full, step_back, carry)
    return *gradients, dstate


def _length(tokens: Tokens) -> int:
    """Tokens of a piece: a power of two, at least a chunk."""
    batch, _, heads, _ = tokens[2].shape
    return 1 << max(64, MOST // (batch * heads)).bit_length() - 1


def _pieces(tokens: Tokens) -> tuple[int, int]:
    """Whole pieces, and tokens behind them; (0, T) where all fit one."""
    length = tokens[2].shape[1]
    if length <= _length(tokens):
        return 0, length
    return divmod(length, _length(tokens))


def _cut(tokens: Tokens, start: Any, size: int) -> list[jax.Array | None]:
    return [
        x if x is None or x.ndim == 1 else lax.dynamic_slice_in_dim(x, start, size, axis=1)
        for x in tokens
    ]


def _continued(S: jax.Array, segment_ids: jax.Array | None, start: Any) -> jax.Array:
    """S, or zero where a segment starts with token `start`; the first token continues what was
    before."""
    if segment_ids is None:
        return S
    goes_on = segment_ids[:, jnp.maximum(start - 1, 0)] == segment_ids[:, start]
    return jnp.where(goes_on[:, None, None, None], S, 0.0)
