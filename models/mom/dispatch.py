"""Which tokens a memory sees: the copies of routed tokens, sorted by memory and, within a memory,
by time.

Letters besides the usual: E memories, J of them per token, R streams of N entries per sequence.
Each memory's part of a stream begins with W - 1 entries for the inputs that its convolution of
width W remembers, so that the tokens before are its own; L = W - 1 + T. Where time is cut into
parts (ops/framework/time_parts.py), each is sorted by itself, and B counts them. Nothing is ever
dropped, and every shape is static:

    one stream     R = 1, N = E (W - 1) + T J: every copy once
    padded         R = E, N = L: a stream per memory, tokens that are not routed to it at the end,
                   inert
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ops.framework.time_parts import along_parts


class Dispatch(NamedTuple):
    """Positions and flags, all without gradient; B R streams of N entries.

    source [B, R N]       where an entry comes from in [E, L], flat
    memory [B R, N]       its memory
    segment [B R, N]      changes with the memory and, within it, with the document
    writes [B R, N]       it is a routed token: it writes to its memory, and decays it
    resets [B R, N]       it is the first of its document there: nothing passes on from before it
    place [B, T, J]       where the copies of a token stand in the flat [R, N]
    recent [B, E, W - 1]  the last tokens of each memory in the last document, oldest first, the
                          latest at the end
    recent_count [B, E]   how many of them there are
    fresh [B]             the last document is not the first
    keeps [B / parts, E]  after the last part the memory holds the last document
    """

    source: jax.Array
    memory: jax.Array
    segment: jax.Array
    writes: jax.Array
    resets: jax.Array
    place: jax.Array
    recent: jax.Array
    recent_count: jax.Array
    fresh: jax.Array
    keeps: jax.Array


def dispatch(
    memory_BTJ: jax.Array,
    document_BT: jax.Array,
    *,
    memories: int,
    history: int,
    one_stream: bool,
    parts: int,
) -> Dispatch:
    """Sorts tokens whose copies go to the memories `memory_BTJ`, distinct for each token; history =
    W - 1.

    document_BT: numbers of documents, from 0, non-decreasing. What is remembered from before
    belongs to document 0.
    parts: the rows of the batch are this many consecutive parts of each sequence.
    """
    batch, length, selected = memory_BTJ.shape
    number_E = jnp.arange(memories)
    routed_BET = (memory_BTJ[:, None] == number_E[None, :, None, None]).any(axis=-1)
    last_B1 = document_BT[:, -1:]
    of_last_BET = routed_BET & (document_BT == last_B1)[:, None]
    stale_BE, stale_last_BE = along_parts(
        _stale_after,
        jnp.zeros((batch // parts, memories), bool),
        (last_B1 > 0, of_last_BET.any(axis=-1), routed_BET.any(axis=-1)),
        parts,
    )
    live_BEL = jnp.pad(routed_BET, ((0, 0), (0, 0), (history, 0)), constant_values=True)
    if one_stream:
        live_BRN = live_BEL.reshape(batch, 1, -1)
        entries = memories * history + length * selected
    else:
        live_BRN, entries = live_BEL, history + length
    streams = live_BRN.shape[1]
    number_R1 = jnp.arange(streams)[:, None]
    # Live entries in the order in which they are, by memory and then by time, found by bisection:
    # they are in order already, and need no sort. Behind them stands the last one, not live.
    counted_BRN = jnp.cumsum(live_BRN, axis=-1)
    order_BRN = _places(counted_BRN, jnp.arange(1, entries + 1)[None, None])
    live_BRN = jnp.arange(entries)[None, None] < counted_BRN[..., -1:]
    source_BRN = order_BRN + (number_R1 * (memories // streams) * (history + length))[None]
    memory_BRN, within_BRN = jnp.divmod(source_BRN, history + length)

    document_BL = jnp.pad(document_BT, ((0, 0), (history, 0)))
    document_BRN = jax.vmap(lambda x, i: x[i])(document_BL, within_BRN)
    same_memory = memory_BRN[..., 1:] == memory_BRN[..., :-1]
    before_BRN = jnp.pad(
        jnp.where(same_memory, document_BRN[..., :-1], 0), ((0, 0), (0, 0), (1, 0))
    )
    writes_BRN = live_BRN & (within_BRN >= history)
    # The first token of a memory resets what an older document left there.
    goes_on_BRN = jnp.pad(same_memory & writes_BRN[..., :-1], ((0, 0), (0, 0), (1, 0)))
    stale_BRN = jax.vmap(lambda x, i: x[i])(stale_BE, memory_BRN) & ~goes_on_BRN

    place_BEL = counted_BRN.reshape(batch, memories, -1) - 1
    if not one_stream:
        place_BEL = place_BEL + (number_R1 * entries)[None]
    place_BTE = jnp.moveaxis(place_BEL[..., history:], 1, 2)
    # The last tokens of each memory in the last document; of no account where there are fewer.
    seen_BET = jnp.cumsum(of_last_BET, axis=-1)
    recent_BEW = _places(seen_BET, seen_BET[..., -1:] - jnp.arange(history)[::-1][None, None])

    def rows(x_BRN: jax.Array) -> jax.Array:
        return x_BRN.reshape(-1, entries)

    return Dispatch(
        source=source_BRN.reshape(batch, -1),
        memory=rows(memory_BRN),
        segment=rows(memory_BRN * (length + 1) + document_BRN),
        writes=rows(writes_BRN),
        resets=rows(writes_BRN & ((document_BRN != before_BRN) | stale_BRN)),
        place=jnp.take_along_axis(place_BTE, memory_BTJ, axis=2),
        recent=recent_BEW,
        recent_count=jnp.minimum(of_last_BET.sum(axis=-1), history),
        fresh=last_B1[:, 0] > 0,
        keeps=~stale_last_BE,
    )


def _places(counts_BRL: jax.Array, number_BRN: jax.Array) -> jax.Array:
    """Where running counts reach a number first; the last place where they never do."""
    number_BRN = jnp.broadcast_to(number_BRN, (*counts_BRL.shape[:2], number_BRN.shape[-1]))
    find = jax.vmap(jax.vmap(jnp.searchsorted))
    return jnp.minimum(find(counts_BRL, number_BRN), counts_BRL.shape[-1] - 1)


def _stale_after(stale_BE: jax.Array, part: tuple[jax.Array, ...]) -> jax.Array:
    """Whether a memory holds an older document than the last of the part."""
    fresh_B1, of_last_BE, any_BE = part
    return jnp.where(fresh_B1, ~of_last_BE, stale_BE & ~any_BE)


def sorted_entries(x_BTEX: jax.Array, tail_BEWX: jax.Array | None, plan: Dispatch) -> jax.Array:
    """The entries [B R, N, X] of the streams: what each memory remembers (None: zeros), and its
    tokens."""
    history = plan.recent.shape[-1]
    x_BELX = jnp.moveaxis(x_BTEX, 1, 2)
    x_BELX = jnp.pad(x_BELX, ((0, 0), (0, 0), (history, 0), (0, 0)))
    if tail_BEWX is not None:
        x_BELX = x_BELX.at[:, :, :history].set(tail_BEWX.astype(x_BELX.dtype))
    x_BLX = x_BELX.reshape(x_BELX.shape[0], -1, x_BELX.shape[-1])
    x_BNX = jnp.take_along_axis(x_BLX, plan.source[..., None], axis=1)
    return x_BNX.reshape(*plan.memory.shape, -1)


def remembered(
    x_BTEX: jax.Array, first: jax.Array, plan: Dispatch, parts: int
) -> tuple[jax.Array, jax.Array]:
    """The last W - 1 entries of each memory, float32, zeros where the document had not begun:
    before each part [B, E, W - 1, X], and after the last one. first: before the first part."""
    history = first.shape[2]
    recent = plan.recent[..., None]
    own = jnp.take_along_axis(jnp.moveaxis(x_BTEX, 1, 2), recent, axis=2)
    place_W = jnp.arange(history)[None, None]

    def after(before: jax.Array, part: tuple[jax.Array, ...]) -> jax.Array:
        own, count_BE, fresh_B = part
        moved_BEW = jnp.minimum(place_W + count_BE[..., None], history - 1)
        before = jnp.take_along_axis(before, moved_BEW[..., None], axis=2)
        before = jnp.where(fresh_B[:, None, None, None], 0.0, before)
        is_own_BEW = place_W >= history - count_BE[..., None]
        return jnp.where(is_own_BEW[..., None], own, before)

    values = own.astype(jnp.float32), plan.recent_count, plan.fresh
    return along_parts(after, first, values, parts)


def copies(x_RNX: jax.Array, plan: Dispatch) -> jax.Array:
    """Each token's entries [B, T, J, X], from all entries [B R, N, X]."""
    batch = plan.place.shape[0]
    x_BNX = x_RNX.reshape(batch, -1, x_RNX.shape[-1])
    x_BPX = jnp.take_along_axis(x_BNX, plan.place.reshape(batch, -1, 1), axis=1)
    return x_BPX.reshape(*plan.place.shape, -1)
