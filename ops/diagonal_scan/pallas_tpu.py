"""Diagonal scan on TPU: chunks in order, the state of a block of channels in registers, token after
token.

    h_t = a_t h_{t-1} + b_t                                                              (1)

Backward runs against the recurrence and takes the states h, the op's own output. With dh_t the
cotangent of h_t (of the last token: plus that of the final state), g_t its gradient and h_{t-1}
zero where a segment starts:

    g_t = dh_t + conj(a_{t+1}) g_{t+1}                                                   (2)
    da_t = g_t conj(h_{t-1})          db_t = g_t          dh_{-1} = conj(a_0) g_0        (3)

where the gradient of a pair of reals is written as the complex number of its two parts. That of a
constant factor is summed over a sequence in fast memory, in float32, and over the batch by XLA.
With `reverse`, t - 1 stands for t + 1 and the other way round: the same programs, whose grid and
loops count from the other end (`ops/tpu/channels.py`).

A token is a row of registers of which one in eight sublanes works: no product of factors is formed,
as a scan inside a register would need, so that the kernel is exact wherever the definition is.
Memory binds with 1024 channels; with fewer than 512 or so the chain of one product after another
does, whose length no number of channels changes.

A number is a tuple of one real array, or of two, real and imaginary part."""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..tpu import channels
from ..tpu.channels import ChannelGrid
from ..tpu.kernel import SUBLANES, Input, call


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes. lanes: channels at most; values: channels times tokens, what fast
    memory holds."""

    lanes: int = 1024
    values: int = 1 << 17


TUNING = Tuning()
WALKS_BACKWARDS = True

Number = tuple[Any, ...]  # the parts of a number of each channel, or references to them


@dataclass(frozen=True)
class Scan:
    """What is static. constant: whether a is the same for all tokens; masked: whether there are
    segments or tokens past T, before which the state is zero."""

    grid: ChannelGrid
    constant: bool
    masked: bool

    @property
    def groups_before(self) -> int:
        """Groups of rows before those of a chunk's states, for the state before the chunk; with
        `reverse` it lies in a group behind them."""
        return 0 if self.grid.reverse else 1

    @property
    def enters_inside(self) -> bool:
        """Whether the recurrence enters the sequence inside a chunk, whose tokens past T it meets
        first. They are masked, so that the initial state has to be brought to token T - 1."""
        return self.grid.reverse and self.grid.length % self.grid.chunk != 0


def forward(a, b, initial_state, segment_ids, *, reverse=False, interpret=False):
    """h and the final state in float32; shapes as in `api.py`, each number a tuple of its parts."""
    scan = _scan(a, b, segment_ids, reverse, interpret)
    grid, parts, size = scan.grid, len(b), b[0].shape[2]
    rows = (grid.group_scratch(),) * parts
    refs = ForwardRefs(
        b=_tokens(b, grid),
        a=_factors(a, scan),
        initial_state=_states(initial_state, grid),
        keep=grid.keep(segment_ids, past=0) if scan.masked else None,
        h=(grid.token_output(b[0], dtype=jnp.float32),) * parts,
        final_state=(grid.sequence_output(1),) * parts,
        b_rows=rows,
        h_rows=rows,
        a_rows=None if scan.constant else rows,
    )
    results = call(functools.partial(diagonal_forward, scan=scan), grid, refs)
    return (
        tuple(part[:, :, :size] for part in results.h),
        tuple(part[:, 0, :size] for part in results.final_state),
    )


def backward(a, h, initial_state, segment_ids, dh, dfinal_state, *, reverse=False, interpret=False):
    """Gradients of a, b and initial_state, tuples like them, in float32; h [B, T, N] are the
    states."""
    scan = _scan(a, h, segment_ids, reverse, interpret)
    grid, parts, size = scan.grid, len(h), h[0].shape[2]
    rows = (grid.group_scratch(),) * parts
    refs = BackwardRefs(
        h=_tokens(h, grid, backward=True),
        a=_factors(a, scan, backward=True),
        dh=_tokens(dh, grid, backward=True),
        edge=_edges(h, grid),
        initial_state=_states(initial_state, grid),
        dfinal_state=_states(dfinal_state, grid),
        keep=grid.keep(segment_ids, backward=True, past=0) if scan.masked else None,
        db=(grid.token_output(h[0], backward=True, dtype=jnp.float32),) * parts,
        da=tuple(
            grid.sequence_output(1) if scan.constant else grid.token_output(part, backward=True)
            for part in a
        ),
        dinitial_state=(grid.sequence_output(1),) * parts,
        h_rows=(grid.group_scratch(beside=1),) * parts,
        g_rows=rows,
        a_rows=None if scan.constant else rows,
    )
    results = call(functools.partial(diagonal_backward, scan=scan), grid, refs)
    da = tuple(part.astype(jnp.float32)[:, :, :size] for part in results.da)
    return (
        tuple(part.sum((0, 1)) for part in da) if scan.constant else da,
        tuple(part[:, :, :size] for part in results.db),
        tuple(part[:, 0, :size] for part in results.dinitial_state),
    )


def chunk_length(size: int) -> int:
    """Tokens per chunk for so many channels, a multiple of 16."""
    return max(16, TUNING.values // min(TUNING.lanes, size) // 16 * 16)


def _scan(a, b, segment_ids, reverse: bool, interpret: bool) -> Scan:
    size = b[0].shape[2]
    chunk = chunk_length(size)
    grid = channels.cut(b[0], chunk, TUNING.lanes, reverse=reverse, interpret=interpret)
    if size <= TUNING.lanes:  # all of them, whole tiles or not
        grid = replace(grid, width=size, lanes=size)
    masked = segment_ids is not None or grid.length % grid.chunk != 0
    return Scan(grid, constant=a[0].ndim == 1, masked=masked)


def _tokens(x: Number, grid: ChannelGrid, backward: bool = False) -> Number:
    return tuple(grid.of_tokens(part, backward) for part in x)


def _states(x_BN: Number, grid: ChannelGrid) -> Number:
    """States [B, N] as [B, 1, width]."""
    parts = (grid.widened(part.astype(jnp.float32))[:, None] for part in x_BN)
    return tuple(grid.of_sequences(part) for part in parts)


def _edges(h: Number, grid: ChannelGrid) -> Number:
    """The states beside a chunk: the last tile of the chunk before, or with `reverse` the first of
    the chunk behind. Any for the chunk that has none."""
    per_chunk, last = grid.groups, pl.cdiv(grid.length, SUBLANES) - 1

    def index(b, t, d):
        chunk_index = grid.chunk_index(t, backward=True)
        if grid.reverse:
            return b, jnp.minimum((chunk_index + 1) * per_chunk, last), d
        return b, jnp.maximum(chunk_index * per_chunk - 1, 0), d

    tile = pl.BlockSpec((1, SUBLANES, grid.lanes), index)
    return tuple(Input(grid.widened(part), tile) for part in h)


def _factors(a: Number, scan: Scan, backward: bool = False) -> Number:
    if not scan.constant:
        return _tokens(a, scan.grid, backward)
    rows = (scan.grid.widened(part.astype(jnp.float32))[None] for part in a)  # [1, width]
    return tuple(scan.grid.constant(row) for row in rows)


# --- Inside a kernel


def _times(x: Number, y: Number) -> Number:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _conjugate(x: Number) -> Number:
    return (x[0], *(-part for part in x[1:]))


def _add(x: Number, y: Number) -> Number:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _write(refs: Number, at: Any, values: Number) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[at] = value


def _read(refs: Number, at: Any) -> Number:
    return tuple(ref[at] for ref in refs)


class Chunk:
    """The factors of one chunk, and what survives into its tokens. a_rows: scratch for them, None
    for a constant factor."""

    def __init__(self, scan: Scan, chunk_index: Any, a: Number, keep: Any, a_rows: Number | None):
        self.keep, self.a_rows = keep, a_rows
        here, _ = scan.grid.places(pl.program_id(2))
        self.a = _read(a, (slice(None), here)) if a_rows is None else None  # [1, L]
        if a_rows is not None:
            _stage(scan.grid, chunk_index, a, a_rows)

    def factor(self, g: Any, row: Any) -> Number:
        """a_t [1, L]."""
        return self.a or _read(self.a_rows or (), _row(g, row))

    def kept(self, x: Number, g: Any, row: Any) -> Number:
        """x, or zero where a segment starts and past T: chosen, because a state may be infinite."""
        if self.keep is None:
            return x
        keep = self.keep[0, 0, 0, g * SUBLANES + row] != 0
        return tuple(jnp.where(keep, part, 0.0) for part in x)


def _stage(grid: ChannelGrid, chunk_index: Any, refs: Number, rows: Number, at: int = 0) -> None:
    """Writes a chunk [1, C, L] to rows [C / 8, 8, L] from group `at` on."""
    for ref, row_ref in zip(refs, rows, strict=True):
        row_ref[at : at + grid.groups] = grid.grouped(grid.read(ref, chunk_index))


def _unstage(grid: ChannelGrid, rows: Number, refs: Number, at: int = 0) -> None:
    """Inverse of `_stage`, in the dtype of the refs."""
    for ref, row_ref in zip(refs, rows, strict=True):
        ref[0] = row_ref[at : at + grid.groups].reshape(ref.shape[1:]).astype(ref.dtype)


def _row(g: Any, row: Any) -> Any:
    return g, pl.ds(row, 1)


def _token(t: int) -> Any:
    """Where rows have token t of a chunk."""
    return t // SUBLANES, slice(t % SUBLANES, t % SUBLANES + 1)


def _state_before(scan: Scan, g: Any, row: Any) -> Any:
    """Where the rows of states have the one before a token, in the direction of the recurrence."""
    shifted = row + (1 if scan.grid.reverse else SUBLANES - 1)
    # NOTE: shifts, because lowering a division asks which TPU is there, and ahead of time none is.
    return _row(g + (shifted >> 3), shifted & SUBLANES - 1)


class ForwardRefs(NamedTuple):
    """Each number a tuple of its parts."""

    b: Number  # [1, C, L]
    a: Number  # [1, C, L], or [1, width] if constant
    initial_state: Number  # [1, 1, width]
    keep: Any  # [1, 1, 1, C], None if nothing is masked
    h: Number  # [1, C, L]
    final_state: Number  # carry [1, 1, width]
    b_rows: Number  # [C / 8, 8, L]
    h_rows: Number  # [C / 8, 8, L]
    a_rows: Number | None  # [C / 8, 8, L], None if constant


def diagonal_forward(refs: ForwardRefs, *, scan: Scan) -> None:
    grid, t = scan.grid, pl.program_id(1)
    here = grid.places(pl.program_id(2))[0]
    at, last = (0, slice(None), here), (grid.length - 1) % grid.chunk

    @pl.when(t == 0)
    def _():
        _write(refs.final_state, at, _read(refs.initial_state, at))

    chunk_index = grid.chunk_index(t)
    chunk = Chunk(scan, chunk_index, refs.a, refs.keep, refs.a_rows)
    _stage(grid, chunk_index, refs.b, refs.b_rows)
    if scan.enters_inside:

        @pl.when(t == 0)
        def _():
            entering = _times(chunk.factor(*divmod(last, SUBLANES)), _read(refs.initial_state, at))
            _write(refs.b_rows, _token(last), _add(_read(refs.b_rows, _token(last)), entering))

    def token(g, row, h):
        now = _row(g, row)
        h = _times(chunk.factor(g, row), chunk.kept(h, g, row))  # [1, L]
        h = _add(h, _read(refs.b_rows, now))  # [1, L], Eq. 1
        _write(refs.h_rows, now, h)
        return h

    h = grid.loop(token, _read(refs.final_state, at), stretch=2)
    _write(refs.final_state, at, h)
    _unstage(grid, refs.h_rows, refs.h)
    if not grid.reverse:  # tokens past T came last

        @pl.when(t == grid.chunks - 1)
        def _():
            _write(refs.final_state, at, _read(refs.h_rows, _token(last)))


class BackwardRefs(NamedTuple):
    """Each number a tuple of its parts."""

    h: Number  # [1, C, L]
    a: Number  # [1, C, L], or [1, width] if constant
    dh: Number  # [1, C, L]
    edge: Number  # [1, 8, L], of h beside the chunk
    initial_state: Number  # [1, 1, width]
    dfinal_state: Number  # [1, 1, width]
    keep: Any  # [1, 1, 1, C], None if nothing is masked
    db: Number  # [1, C, L]
    da: Number  # [1, C, L], or a sum over time [1, 1, width] if constant
    dinitial_state: Number  # carry conj(a) g [1, 1, width]
    # The gradients take the places of what they are made of: g_t that of dh_t, da_t that of h_t.
    h_rows: Number  # [1 + C / 8, 8, L]
    g_rows: Number  # [C / 8, 8, L]
    a_rows: Number | None  # [C / 8, 8, L], None if constant


def diagonal_backward(refs: BackwardRefs, *, scan: Scan) -> None:
    grid, t = scan.grid, pl.program_id(1)
    here = grid.places(pl.program_id(2))[0]
    at, chunk_index = (0, slice(None), here), grid.chunk_index(t, backward=True)
    last = (grid.length - 1) % grid.chunk
    zeros = (jnp.zeros((1, grid.lanes), jnp.float32),) * len(refs.h)
    chunk = Chunk(scan, chunk_index, refs.a, refs.keep, refs.a_rows)
    _stage(grid, chunk_index, refs.dh, refs.g_rows)
    _stage(grid, chunk_index, refs.h, refs.h_rows, at=scan.groups_before)
    _write_state_before_chunk(refs, scan, chunk_index, at)

    @pl.when(t == 0)
    def _():
        first = _token(0 if grid.reverse else last)  # that this kernel takes
        dfirst = _add(_read(refs.g_rows, first), _read(refs.dfinal_state, at))
        _write(refs.g_rows, first, dfirst)
        _write(refs.dinitial_state, at, zeros)
        if scan.constant:
            _write(refs.da, at, zeros)

    def token(g, row, carry):
        ag, da = carry  # conj(a_{t+1}) g_{t+1}; of a constant factor, its gradient
        now = _row(g, row)
        g_t = _add(_read(refs.g_rows, now), ag)  # [1, L], Eq. 2
        _write(refs.g_rows, now, g_t)
        before = chunk.kept(_read(refs.h_rows, _state_before(scan, g, row)), g, row)
        da_t = _times(g_t, _conjugate(before))  # [1, L], Eq. 3
        if scan.constant:
            da = _add(da, da_t)
        else:
            _write(refs.h_rows, _row(g + scan.groups_before, row), da_t)
        return chunk.kept(_times(_conjugate(chunk.factor(g, row)), g_t), g, row), da

    carry = _read(refs.dinitial_state, at), _read(refs.da, at) if scan.constant else zeros
    ag, da = grid.loop(token, carry, backward=True, stretch=2)
    _write(refs.dinitial_state, at, ag)
    if scan.constant:
        _write(refs.da, at, da)
    _unstage(grid, refs.g_rows, refs.db)
    if not scan.constant:
        _unstage(grid, refs.h_rows, refs.da, at=scan.groups_before)
    if scan.enters_inside:

        @pl.when(t == grid.chunks - 1)
        def _():
            factor = _conjugate(chunk.factor(*divmod(last, SUBLANES)))
            dinitial = _times(factor, _read(refs.g_rows, _token(last)))  # Eq. 3
            _write(refs.dinitial_state, at, dinitial)


def _write_state_before_chunk(refs: BackwardRefs, scan: Scan, chunk_index: Any, at: Any) -> None:
    """Writes the state that the chunk started from beside the chunk's states."""
    grid = scan.grid
    # Of the tile beside the chunk the row that is next to it.
    edge = tuple(ref[0, :1] if grid.reverse else ref[0, -1:] for ref in refs.edge)  # [1, L]
    is_first = chunk_index == (grid.chunks - 1 if grid.reverse else 0)
    initial = _read(refs.initial_state, at)  # [1, L]
    before = (jnp.where(is_first, *parts) for parts in zip(initial, edge, strict=True))
    place = _row(grid.groups, 0) if grid.reverse else _row(0, SUBLANES - 1)
    _write(refs.h_rows, place, tuple(before))
    if scan.enters_inside:

        @pl.when(is_first)
        def _():
            _write(refs.h_rows, _token(grid.length % grid.chunk), initial)
