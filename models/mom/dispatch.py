"""Which tokens a memory sees: every token has J copies, one for each memory that it is routed to,
and the copies are sorted by memory and, within a memory, by time.

A sequence becomes R streams of N entries. In a stream, W - 1 entries for the inputs that a memory's
convolution of width W remembers stand before the tokens of that memory, so that what precedes a
token is the memory's own. Nothing is ever dropped, and every shape is static:

    one stream     R = 1, N = E (W - 1) + T J: every copy once
    padded         R = E, N = W - 1 + T: a stream per memory; entries behind its last token are
                   padding, which neither writes nor decays

The recurrence reads no remembered inputs. Where they begin every stream it leaves them out (padded:
T entries); elsewhere they are entries that neither write nor decay.

Where a mesh cuts time, the parts of a sequence are sorted where they are, each by itself
(ops/framework/time_parts.py): B counts parts, T their tokens, and what passes from part to part is
what would pass from call to call.

The examples below have E = 2 memories a and b, T = 5 tokens, J = 1 and W = 2. Tokens 0, 2, 3 are
routed to a and tokens 1, 4 to b; "ra" is the input that a's convolution remembers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ops.framework.sharding import time_parts
from ops.framework.time_parts import along_parts, documents, to_parts, to_whole


class Order(NamedTuple):
    """The order of the entries, which has no gradient."""

    source: jax.Array  # [B, R N]: where an entry comes from in [E, L], flat; L = W - 1 + T
    memory: jax.Array  # [B, R, N]: its memory
    position: jax.Array  # [B, R, N]: its place in L; token t has position W - 1 + t
    is_token: jax.Array  # [B, R, N]: false for remembered inputs and for padding
    choice: jax.Array  # [B, R, N]: which of its token's copies an entry is
    # [B, T, J]: where the copies of a token stand in the flat [R, N'], N' entries of the recurrence
    place: jax.Array


class Segments(NamedTuple):
    """What must not see each other."""

    ids: jax.Array  # [B, R, N]: change with the memory and, within it, with the document
    resets: jax.Array  # [B, R, N]: a token before which its memory has to forget everything


class Latest(NamedTuple):
    """What the convolutions remember of a part."""

    tokens: jax.Array  # [B, E, W - 1]: the last tokens of each memory, oldest first
    choice: jax.Array  # [B, E, W - 1]: which of the token's copies is the memory's
    valid_count: jax.Array  # [B, E]: how many of them there are, at the end of the W - 1
    starts_document: jax.Array  # [B]: a document starts in the part: what was remembered is gone


def sort_to_memories(
    routed_BET: jax.Array,
    memory_BTJ: jax.Array,
    choice_BET: jax.Array,
    *,
    history: int,
    one_stream: bool,
) -> Order:
    """The order of the copies of tokens.

    The copies of token t go to the memories memory_BTJ[:, t], which are all different, where
    routed_BET is true, and there they are copy choice_BET. history is W - 1.

        position     0  1  2  3  4  5             L = 6
        memory a    ra  0  .  2  3  .             a row of [E, L]: its sources are 0 .. 5
        memory b    rb  .  1  .  .  4             its sources are 6 .. 11

        one stream  ra  0  2  3 rb  1  4          source 0 1 3 4 6 8 11      place 1 5 2 3 6
        padded      ra  0  2  3  -  -             place 0 1 2 of tokens 0 2 3
                    rb  1  4  -  -  -             place 5 6 of tokens 1 4
    """
    batch, memories, length = routed_BET.shape
    choice_BEL = jnp.pad(choice_BET, ((0, 0), (0, 0), (history, 0)))
    live_BEL = jnp.pad(routed_BET, ((0, 0), (0, 0), (history, 0)), constant_values=True)
    if one_stream:
        live_BRN = live_BEL.reshape(batch, 1, -1)
        entries = memories * history + length * memory_BTJ.shape[2]
    else:
        live_BRN, entries = live_BEL, history + length
    streams = live_BRN.shape[1]
    number_R1 = jnp.arange(streams)[:, None]
    # Live entries are in order already: they need no sort, and are found by bisection of their
    # running count. Padding has the source of the last entry.
    count_BRN = jnp.cumsum(live_BRN, axis=-1)
    order_BRN = _first_places(count_BRN, jnp.arange(1, entries + 1)[None, None])
    is_live_BRN = jnp.arange(entries)[None, None] < count_BRN[..., -1:]
    source_BRN = order_BRN + (number_R1 * (memories // streams) * (history + length))[None]
    memory_BRN, position_BRN = jnp.divmod(source_BRN, history + length)

    place_BEL = count_BRN.reshape(batch, memories, -1) - 1
    if not one_stream:
        place_BEL = place_BEL + (number_R1 * length - history)[None]
    place_BTE = jnp.moveaxis(place_BEL[..., history:], 1, 2)
    return Order(
        source=source_BRN.reshape(batch, -1),
        memory=memory_BRN,
        position=position_BRN,
        is_token=is_live_BRN & (position_BRN >= history),
        choice=_of_row(choice_BEL.reshape(batch, -1), source_BRN),
        place=jnp.take_along_axis(place_BTE, memory_BTJ, axis=2),
    )


def separate_documents(
    order: Order, document_BT: jax.Array, outdated_BE: jax.Array, *, history: int
) -> Segments:
    """The segments of the convolutions, and where memories are reset.

    document_BT: numbers of documents, from 0, non-decreasing; what is remembered from before
    belongs to document 0. outdated_BE: whether a memory holds an older document than that.

        entry       ra  0  2  3 rb  1  4          one stream, tokens 0, 1 | 2, 3, 4
        document     0  0  1  1  0  0  1
        ids         a0 a0 a1 a1 b0 b0 b1
        resets       .  .  x  .  .  .  x          and on 0 or 1 where a or b is outdated
    """
    length = document_BT.shape[1]
    document_BL = jnp.pad(document_BT, ((0, 0), (history, 0)))
    document_BRN = _of_row(document_BL, order.position)
    same_memory = order.memory[..., 1:] == order.memory[..., :-1]
    before_BRN = jnp.pad(
        jnp.where(same_memory, document_BRN[..., :-1], 0), ((0, 0), (0, 0), (1, 0))
    )
    # Of the tokens of a memory the first one alone meets what an older document left there.
    follows_BRN = jnp.pad(same_memory & order.is_token[..., :-1], ((0, 0), (0, 0), (1, 0)))
    outdated_BRN = _of_row(outdated_BE, order.memory) & ~follows_BRN
    return Segments(
        ids=order.memory * (length + 1) + document_BRN,
        resets=order.is_token & ((document_BRN != before_BRN) | outdated_BRN),
    )


def latest_tokens(
    routed_BET: jax.Array, choice_BET: jax.Array, document_BT: jax.Array, *, history: int
) -> Latest:
    """The last W - 1 tokens of each memory in the part's last document.

    Tokens 0, 1 | 2, 3, 4: token 3 of a and token 4 of b. Tokens 0, 1, 2, 3 | 4: token 4 of b, and
    none of a (valid_count 0), whose convolution remembers zeros. history is W - 1."""
    last_B1 = document_BT[:, -1:]
    of_last_BET = routed_BET & (document_BT == last_B1)[:, None]
    count_BET = jnp.cumsum(of_last_BET, axis=-1)
    wanted_BEW = count_BET[..., -1:] - jnp.arange(history)[::-1][None, None]
    tokens_BEW = _first_places(count_BET, wanted_BEW)
    return Latest(
        tokens=tokens_BEW,
        choice=jnp.take_along_axis(choice_BET, tokens_BEW, axis=2),
        valid_count=jnp.minimum(of_last_BET.sum(axis=-1), history),
        starts_document=last_B1[:, 0] > 0,
    )


def outdated_memories(
    routed_BET: jax.Array, document_BT: jax.Array, parts: int
) -> tuple[jax.Array, jax.Array]:
    """Whether a memory holds a document that is over.

    Before each part [B, E]: one older than the document that goes on there. After the last part
    [B / parts, E]: one older than the last document."""
    batch, memories, _ = routed_BET.shape
    last_B1 = document_BT[:, -1:]
    of_last_BET = routed_BET & (document_BT == last_B1)[:, None]

    def after(outdated_BE: jax.Array, part: tuple[jax.Array, ...]) -> jax.Array:
        starts_document_B1, has_last_BE, has_any_BE = part
        return jnp.where(starts_document_B1, ~has_last_BE, outdated_BE & ~has_any_BE)

    first = jnp.zeros((batch // parts, memories), bool)
    values = last_B1 > 0, of_last_BET.any(axis=-1), routed_BET.any(axis=-1)
    return along_parts(after, first, values, parts)


@dataclass(frozen=True)
class Dispatch:
    """The entries of a call, and how arrays go there and come back."""

    memories: int
    one_stream: bool
    parts: int  # of each sequence; the rows of the batch are parts
    order: Order
    segments: Segments
    latest: Latest
    outdated: jax.Array  # [B / parts, E]: the memory does not hold the last document

    @property
    def segment_ids(self) -> jax.Array:
        """What the convolutions of parts must not look across [B R, N]."""
        return _rows(self.segments.ids)

    @property
    def memory(self) -> jax.Array:
        """The memory of each entry [B R, N]."""
        return _rows(self.order.memory)

    @property
    def writes(self) -> jax.Array:
        """Whether an entry writes to its memory and decays it [B R, N]: tokens do."""
        return _rows(self.order.is_token)

    @property
    def resets(self) -> jax.Array:
        """Whether a memory has to forget everything before this entry [B R, N]."""
        return _rows(self.segments.resets)

    def sorted(self, x_BTSX: jax.Array) -> jax.Array:
        """The entries [B R, N, X]; zeros for what is remembered.

        x: the inputs of each entry [B, T, S, X]: S = 1 for all memories of a token alike, E, one
        of every memory, or J < E, one of every copy."""
        return self._entries(to_parts(x_BTSX, self.parts), None)

    def sorted_after(self, x_BTSX: jax.Array, tail_BEWX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The entries [B R, N, X], and what each memory remembers next [B, E, W - 1, X], float32.

        x: as in `sorted`; tail [B, E, W - 1, X]: the inputs that each memory remembers."""
        x_BTSX = to_parts(x_BTSX, self.parts)
        before, last = self._remembered(x_BTSX, tail_BEWX)
        return self._entries(x_BTSX, before), last

    def streams(self, x_RNX: jax.Array) -> jax.Array:
        """Streams of whole sequences as the recurrence takes them, of streams [B R, N, ...] of
        parts: a stream goes on in the next part."""
        tokens = self.order.place.shape[1]
        return to_whole(x_RNX if self.one_stream else x_RNX[:, -tokens:], self.parts)

    def copies(self, y_RNX: jax.Array) -> jax.Array:
        """The entries of each token [B, T, J, X], given the streams of whole sequences."""
        place_BTJ = self.order.place
        y_BNX = to_parts(y_RNX, self.parts).reshape(len(place_BTJ), -1, y_RNX.shape[-1])
        y_BPX = jnp.take_along_axis(y_BNX, place_BTJ.reshape(len(place_BTJ), -1, 1), axis=1)
        return to_whole(y_BPX.reshape(*place_BTJ.shape, -1), self.parts)

    def _entries(self, x_BTSX: jax.Array, tail_BEWX: jax.Array | None) -> jax.Array:
        """Of parts."""
        (batch, length, sources, size), history = x_BTSX.shape, self.latest.tokens.shape[-1]
        memory, position = self.order.memory, self.order.position
        if tail_BEWX is None:
            tail_BEWX = jnp.zeros((batch, self.memories, history, size), x_BTSX.dtype)
        rows = x_BTSX.reshape(batch, -1, size), tail_BEWX.reshape(batch, -1, size)
        of_tail = length * sources + memory * history + position
        index_BRN = self._row(sources, position - history, memory, self.order.choice)
        index_BRN = jnp.where(position < history, of_tail, index_BRN)
        x_BPX = jnp.concatenate([rows[0], rows[1].astype(x_BTSX.dtype)], axis=1)
        x_BNX = jnp.take_along_axis(x_BPX, index_BRN.reshape(batch, -1, 1), axis=1)
        return x_BNX.reshape(-1, memory.shape[-1], size)

    def _row(self, sources: int, token: jax.Array, memory: Any, choice: Any) -> jax.Array:
        """Where a token's input for a memory stands in the flat [T, S]."""
        if sources == 1:
            return token
        return token * sources + (memory if sources == self.memories else choice)

    def _remembered(self, x_BTSX: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last W - 1 inputs of each memory [B, E, W - 1, X]: before each part, after the last.

        float32; zeros where the document had not begun. `first` is before the first part."""
        history = first.shape[2]
        memory = jnp.arange(self.memories)[None, :, None]
        index_BEW = self._row(x_BTSX.shape[2], self.latest.tokens, memory, self.latest.choice)
        rows_BPX = x_BTSX.reshape(len(x_BTSX), -1, x_BTSX.shape[-1])
        latest_BEWX = jax.vmap(lambda rows, index: rows[index])(rows_BPX, index_BEW)
        place_W = jnp.arange(history)[None, None]

        def after(before: jax.Array, part: tuple[jax.Array, ...]) -> jax.Array:
            latest_BEWX, count_BE, starts_document_B = part
            moved_BEW = jnp.minimum(place_W + count_BE[..., None], history - 1)
            before = jnp.take_along_axis(before, moved_BEW[..., None], axis=2)
            before = jnp.where(starts_document_B[:, None, None, None], 0.0, before)
            is_of_part_BEW = place_W >= history - count_BE[..., None]
            return jnp.where(is_of_part_BEW[..., None], latest_BEWX, before)

        values = (
            latest_BEWX.astype(jnp.float32),
            self.latest.valid_count,
            self.latest.starts_document,
        )
        return along_parts(after, first, values, self.parts)


def dispatch(
    memory_BTJ: jax.Array,
    segment_ids: jax.Array | None,
    *,
    memories: int,
    history: int,
    one_stream: bool,
) -> Dispatch:
    """The dispatch of tokens whose copies go to the memories `memory_BTJ`, distinct for each token.

    history: W - 1. segment_ids [B, T]: where the id changes a document starts."""
    batch, length, _ = memory_BTJ.shape
    parts = time_parts()
    document_BT = documents(segment_ids, batch, length, parts)
    memory_BTJ = to_parts(memory_BTJ, parts)
    number_1E11 = jnp.arange(memories)[None, :, None, None]
    is_copy_BETJ = memory_BTJ[:, None] == number_1E11
    routed_BET, choice_BET = is_copy_BETJ.any(axis=-1), jnp.argmax(is_copy_BETJ, axis=-1)
    before, after = outdated_memories(routed_BET, document_BT, parts)
    order = sort_to_memories(
        routed_BET, memory_BTJ, choice_BET, history=history, one_stream=one_stream
    )
    return Dispatch(
        memories=memories,
        one_stream=one_stream,
        parts=parts,
        order=order,
        segments=separate_documents(order, document_BT, before, history=history),
        latest=latest_tokens(routed_BET, choice_BET, document_BT, history=history),
        outdated=after,
    )


def _first_places(count_BRL: jax.Array, number_BRN: jax.Array) -> jax.Array:
    """Where running counts reach a number first; the last place where they never do."""
    number_BRN = jnp.broadcast_to(number_BRN, (*count_BRL.shape[:2], number_BRN.shape[-1]))
    find = jax.vmap(jax.vmap(jnp.searchsorted))
    return jnp.minimum(find(count_BRL, number_BRN), count_BRL.shape[-1] - 1)


def _rows(x_BRN: jax.Array) -> jax.Array:
    """[B R, N], the streams as rows."""
    return x_BRN.reshape(-1, x_BRN.shape[-1])


def _of_row(x_BL: jax.Array, index_BRN: jax.Array) -> jax.Array:
    """x at these places of its row: [B, R, N]."""
    return jax.vmap(lambda x, i: x[i])(x_BL, index_BRN)
