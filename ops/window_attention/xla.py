"""Window attention by blocks: each block of queries attends to itself and to the block before it.

With blocks of C >= window - 1 tokens no query looks further back than the previous block, so the
logits take T x 2C numbers instead of T x T. A sequence of one block attends to the initial state
and itself directly, so that a decode step costs the window. Where the window is wide, full
attention above all, blocks of queries take turns, each with the window before it, so that the
logits of one block are all there is. The backward rule recomputes the logits: only the inputs are
kept.

`jax.nn.dot_product_attention` would do for a block, but it wants keys and values of one size and
runs float32 inputs at the backend's default precision.

Letters: B batch, T time, G blocks, C block length, H heads, M key heads, R = H / M, K key, V value,
P = window - 1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework import segments

# Below this length the products are too small to be worth a block of their own; above, the logits
# of all blocks at once would be too large to keep.
SHORTEST_BLOCK, LONGEST_BLOCK = 32, 1024


def _runs(segment_ids, valid_past, batch, length):
    """[B, P + T] int32: the number of a token's segment, -1 for a token that is not there."""
    if segment_ids is None:
        runs_BT = jnp.zeros((batch, length), jnp.int32)
    else:
        runs_BT = segments.numbers(segment_ids)
    return jnp.concatenate([jnp.where(valid_past, 0, -1), runs_BT], axis=1)


def _pad_time(x, before, after, fill=0):
    """[B, T, ...] with `before` rows of `fill` in front and `after` behind."""
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)


def _blocks(x, block):
    """[B, G C, ...] -> [B, G, C, ...]."""
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _with_previous(x, block):
    """[B, (G + 1) C, ...] -> [B, G, 2C, ...]: each block but the first, behind the one before
    it."""
    x = _blocks(x, block)
    return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)


def _attend(q, k, v, q_runs, k_runs, window, scale, activation):
    """Attention of q [..., C, H, K] to k, v [..., S, M, K | V]; the last C of the S keys stand
    beside the queries."""
    *leading, C, H, K = q.shape
    S, M, R = *k.shape[-3:-1], H // k.shape[-2]
    distance = (S - C) + jnp.arange(C)[:, None] - jnp.arange(S)[None, :]
    near = ((distance >= 0) & (distance < window)).reshape((1,) * len(leading) + (C, S))
    sees = near & (q_runs[..., :, None] == k_runs[..., None, :])
    # Heads before time, one matrix each: CPU products of arrays that lie otherwise take four times
    # as long.
    q = jnp.moveaxis(q.reshape(*leading, C, M, R, K), -4, -2)
    k, v = (jnp.swapaxes(x, -3, -2) for x in (k, v))
    logits = einsum("...mck,...msk->...mcs", q.reshape(*leading, M, R * C, K), k)
    logits = scale * logits.reshape(*leading, M, R, C, S)
    sees = sees[..., None, None, :, :]
    if activation == "squared_relu":
        p = jnp.where(sees, jnp.square(jax.nn.relu(logits)), 0.0)
    else:
        # The lowest number, not -inf: its softmax is 0 as exactly, and a padded query that sees
        # nothing has no NaN.
        lowest = jnp.finfo(jnp.float32).min
        p = jax.nn.softmax(jnp.where(sees, logits, lowest), axis=-1)
    o = einsum("...mcs,...msv->...mcv", p.reshape(*leading, M, R * C, S), v)
    o = jnp.moveaxis(o.reshape(*leading, M, R, C, -1), -2, -4)
    return o.reshape(*leading, C, H, v.shape[-1])


def _attend_in_turn(q, k, v, q_runs, k_runs, window, scale, activation, block):
    """`_attend` of q [B, T, H, K] to the T + P keys, one block of queries after another."""
    batch, length = q.shape[:2]
    past, after = k.shape[1] - length, -length % block
    k, v, k_runs = (_pad_time(x, 0, after, fill) for x, fill in ((k, 0), (v, 0), (k_runs, -1)))

    @jax.checkpoint
    def one(block_of_queries):
        number, q, q_runs = block_of_queries
        before_and_own = (
            lax.dynamic_slice_in_dim(x, number * block, past + block, axis=1)
            for x in (k, v, k_runs)
        )
        k_near, v_near, near_runs = before_and_own
        return _attend(q, k_near, v_near, q_runs, near_runs, window, scale, activation)

    q_GBC, runs_GBC = (
        jnp.moveaxis(_blocks(_pad_time(x, 0, after, fill), block), 1, 0)
        for x, fill in ((q, 0), (q_runs, -1))
    )
    o = lax.map(one, (jnp.arange(len(q_GBC)), q_GBC, runs_GBC))
    return jnp.moveaxis(o, 0, 1).reshape(batch, -1, *o.shape[3:])[:, :length]


class Joined(NamedTuple):
    """Keys and values [B, P + T, ...] of past and present.

    runs: [B, P + T], the number of a token's segment, -1 for a token that is not there.
    first: the index of the first key that can be there."""

    k: jax.Array
    v: jax.Array
    runs: jax.Array
    first: int


def join(k, v, k_past, v_past, valid_past, segment_ids, window) -> Joined:
    """Keys and values with the initial state in front of them, zeros where there is none."""
    batch, length = k.shape[:2]
    past, first = window - 1, 0
    if valid_past is None:
        k, v = (_pad_time(x, past, 0) for x in (k, v))
        valid_past, first = jnp.zeros((batch, past), bool), past
    else:
        k = jnp.concatenate([k_past.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([v_past.astype(v.dtype), v], axis=1)
    return Joined(k, v, _runs(segment_ids, valid_past, batch, length), first)


def last_state(joined: Joined, length: int):
    """The parts of the state after the tokens: k, v and valid of the last window - 1 of them, zeros
    where not valid."""
    valid = joined.runs[:, length:] == joined.runs[:, -1:]
    k, v = (jnp.where(valid[:, :, None, None], x[:, length:], 0) for x in (joined.k, joined.v))
    return k, v, valid


def forward(q, k, v, k_past, v_past, valid_past, segment_ids, *, window, scale, activation):
    """o in float32 and the parts of the final state, whose keys and values are zeros where not
    valid; shapes as in `api.py`, the initial state by its parts or three times None."""
    batch, length = q.shape[:2]
    dtypes, past = (k.dtype, v.dtype), window - 1
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    joined = join(k, v, k_past, v_past, valid_past, segment_ids, window)
    k, v, runs, first = joined
    q_runs, block = runs[:, past:], max(past, SHORTEST_BLOCK)
    # All keys at once, where blocks of queries would not have fewer.
    if length <= LONGEST_BLOCK and runs.shape[1] - first <= 2 * block:
        k, v, k_runs = k[:, first:], v[:, first:], runs[:, first:]
        o = _attend(q, k, v, q_runs, k_runs, window, scale, activation)
    elif block > LONGEST_BLOCK:
        # The farthest key that a query can see and that there is.
        farthest = max(0, min(first, past - length))
        k, v, k_runs = k[:, farthest:], v[:, farthest:], runs[:, farthest:]
        o = _attend_in_turn(q, k, v, q_runs, k_runs, window, scale, activation, LONGEST_BLOCK // 2)
    else:
        before, after = block - past, -length % block
        k_blocks, v_blocks = (_with_previous(_pad_time(x, before, after), block) for x in (k, v))
        k_runs = _with_previous(_pad_time(runs, before, after, -1), block)
        q_blocks = _blocks(_pad_time(q, 0, after), block)
        q_runs = _blocks(_pad_time(q_runs, 0, after, -1), block)
        o = _attend(q_blocks, k_blocks, v_blocks, q_runs, k_runs, window, scale, activation)
        o = o.reshape(batch, -1, *o.shape[3:])[:, :length]
    k, v, valid = last_state(joined, length)
    return o, k.astype(dtypes[0]), v.astype(dtypes[1]), valid


def backward(
    q,
    k,
    v,
    k_past,
    v_past,
    valid_past,
    segment_ids,
    do,
    dk_last,
    dv_last,
    *,
    window,
    scale,
    activation,
):
    """Gradients of q, k, v, k_past and v_past (None without initial state), and None for
    valid_past."""

    def outputs(q, k, v, k_past, v_past):
        return forward(
            *(q, k, v, k_past, v_past, valid_past, segment_ids),
            window=window,
            scale=scale,
            activation=activation,
        )[:3]

    _, pullback = jax.vjp(outputs, q, k, v, k_past, v_past)
    return *pullback((do.astype(jnp.float32), dk_last, dv_last)), None
