"""Diagonal scan on TPU: chunks in order, the state of a block of channels in registers, token after
token.

    h_t = a_t h_{t-1} + b_t

Backward runs from the last chunk to the first and takes the states h, the op's own output. With
dh_t the cotangent of h_t (of the last token: plus that of the final state), g_t its gradient and
h_{t-1} zero where a segment starts:

    g_t = dh_t + conj(a_{t+1}) g_{t+1}        da_t = g_t conj(h_{t-1})        db_t = g_t
    dh_{-1} = conj(a_0) g_0

where the gradient of a pair of reals is written as the complex number of its two parts. That of a
constant factor is summed over a sequence in fast memory, in float32, and over the batch by XLA.

A token is a row of registers of which one in eight sublanes works: no product of factors is formed,
as a scan inside a register would need, so that the kernel is exact wherever the definition is.
Memory binds with 1024 channels; with fewer than 512 or so the chain of one product after another
does, whose length no number of channels changes.

A number is a tuple of one real array, or of two, real and imaginary part.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..tpu.channels import SUBLANES, Blocks, call, cut, keep_scalars, pad_channels


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes. lanes: channels at most; values: channels times tokens, what fast
    memory holds."""

    lanes: int = 1024
    values: int = 1 << 17


TUNING = Tuning()

Rows = tuple[Any, ...]  # a number of each channel, or references to such rows


@dataclass(frozen=True)
class _Scan:
    """What is static. parts: 1 or 2; masked: there are segments or tokens past T, before which the
    state is zero."""

    blocks: Blocks
    parts: int
    constant: bool
    masked: bool

    def take(self, refs: Sequence[Any], *present: bool) -> tuple[list[Any], Any]:
        """The references of each number that is present, None for others, and what follows them."""
        numbers, at = [], 0
        for is_present in present:
            numbers.append(tuple(refs[at : at + self.parts]) if is_present else None)
            at += self.parts * is_present
        return numbers, refs[at:]


def forward(a, b, initial_state, segment_ids, *, interpret=False):
    """Shapes as in `api.py`, each number a tuple of its parts; returns h and the final state in
    float32."""
    scan = _scan(a, b, segment_ids)
    blocks, channels = scan.blocks, b[0].shape[2]
    row = _rows(blocks)
    outputs = call(
        functools.partial(_diagonal_forward, scan=scan),
        blocks,
        [
            *_tokens(b, blocks),
            *_factors(a, scan),
            *((_one_row(part, blocks), row) for part in initial_state),
            *_masks(segment_ids, scan),
        ],
        [
            *[(_states(blocks), blocks.tokens())] * scan.parts,
            *[(_float32(blocks.batch, 1, blocks.width), row)] * scan.parts,
        ],
        [blocks.group_scratch()] * ((2 if scan.constant else 3) * scan.parts),
        interpret=interpret,
    )
    (h, final), _ = scan.take(outputs, True, True)
    return (
        tuple(part[:, :, :channels] for part in h),
        tuple(part[:, 0, :channels] for part in final),
    )


def backward(a, h, initial_state, segment_ids, dh, dfinal_state, *, interpret=False):
    """Cotangents of a, b and initial_state, tuples like them, in float32; h [B, T, N] are the
    states."""
    scan = _scan(a, h, segment_ids)
    blocks, channels = scan.blocks, h[0].shape[2]
    row, tokens = _rows(blocks), blocks.tokens(reverse=True)
    one_state = _float32(blocks.batch, 1, blocks.width)

    outputs = call(
        functools.partial(_diagonal_backward, scan=scan),
        blocks,
        [
            *_tokens(h, blocks, reverse=True),
            *_factors(a, scan, reverse=True),
            *_tokens(dh, blocks, reverse=True),
            *_edges(h, blocks),
            *((_one_row(part, blocks), row) for part in initial_state),
            *((_one_row(part, blocks), row) for part in dfinal_state),
            *_masks(segment_ids, scan, reverse=True),
        ],
        [
            *[(_states(blocks), tokens)] * scan.parts,
            *((one_state, row) if scan.constant else (_like(part, blocks), tokens) for part in a),
            *[(one_state, row)] * scan.parts,
        ],
        [
            *[blocks.group_scratch(1)] * scan.parts,
            *[blocks.group_scratch()] * ((1 if scan.constant else 2) * scan.parts),
        ],
        interpret=interpret,
    )
    (db, da, dinitial), _ = scan.take(outputs, True, True, True)
    da = tuple(part.astype(jnp.float32)[:, :, :channels] for part in da)
    return (
        tuple(part.sum((0, 1)) for part in da) if scan.constant else da,
        tuple(part[:, :, :channels] for part in db),
        tuple(part[:, 0, :channels] for part in dinitial),
    )


def chunk_length(channels: int) -> int:
    """Tokens per chunk, a multiple of 16."""
    return max(16, TUNING.values // min(TUNING.lanes, channels) // 16 * 16)


def _scan(a, b, segment_ids) -> _Scan:
    channels = b[0].shape[2]
    blocks = cut(b[0], chunk_length(channels), TUNING.lanes)
    if channels <= TUNING.lanes:  # all of them, whole tiles or not
        blocks = replace(blocks, width=channels, lanes=channels)
    masked = segment_ids is not None or blocks.length % blocks.chunk != 0
    return _Scan(blocks, len(b), a[0].ndim == 1, masked)


def _widened(x: jax.Array, blocks: Blocks) -> jax.Array:
    return x if x.shape[-1] == blocks.width else pad_channels(x)


def _one_row(x_BN: jax.Array, blocks: Blocks) -> jax.Array:
    return _widened(x_BN.astype(jnp.float32), blocks)[:, None]


def _rows(blocks: Blocks) -> pl.BlockSpec:
    return blocks.sequence(1)


def _tokens(x, blocks: Blocks, reverse: bool = False) -> list[Any]:
    return [(_widened(part, blocks), blocks.tokens(reverse)) for part in x]


def _edges(h, blocks: Blocks) -> list[Any]:
    """The last tile of the chunk before, for the state before a chunk; of the first chunk: any."""
    per_chunk = blocks.chunk // SUBLANES

    def index(b, t, d):
        return b, jnp.maximum((blocks.chunks - 1 - t) * per_chunk - 1, 0), d

    spec = pl.BlockSpec((1, SUBLANES, blocks.lanes), index)
    return [(_widened(part, blocks), spec) for part in h]


def _factors(a, scan: _Scan, reverse: bool = False) -> list[Any]:
    if not scan.constant:
        return _tokens(a, scan.blocks, reverse)
    rows = (_widened(part.astype(jnp.float32), scan.blocks)[None] for part in a)
    return [(row, scan.blocks.constant(1)) for row in rows]


def _masks(segment_ids, scan: _Scan, reverse: bool = False) -> list[Any]:
    return [keep_scalars(segment_ids, scan.blocks, reverse, past=0)] if scan.masked else []


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _states(blocks: Blocks) -> jax.ShapeDtypeStruct:
    return _float32(blocks.batch, blocks.length, blocks.width)


def _like(x: jax.Array, blocks: Blocks) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:2], blocks.width), x.dtype)


def _times(x: Rows, y: Rows) -> Rows:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _conjugate(x: Rows) -> Rows:
    return (x[0], *(-part for part in x[1:]))


def _add(x: Rows, y: Rows) -> Rows:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _write(refs: Rows, at: Any, values: Rows) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[at] = value


def _read(refs: Rows, at: Any) -> Rows:
    return tuple(ref[at] for ref in refs)


class _Chunk:
    """One chunk in fast memory: rows of the factors."""

    def __init__(self, scan, chunk_index, a_refs, mask_refs, a_rows):
        self.a_rows = a_rows
        self.mask_ref = mask_refs[0] if scan.masked else None
        here, _ = scan.blocks.places(pl.program_id(2))
        self.a = _read(a_refs, (slice(None), here)) if scan.constant else None
        if not scan.constant:
            _stage(scan.blocks, chunk_index, a_refs, a_rows)

    def factor(self, g: Any, row: Any) -> Rows:
        return self.a or _read(self.a_rows, _row(g, row))

    def kept(self, x: Rows, g: Any, row: Any) -> Rows:
        """x, or zero where a segment starts and past T: chosen, because a state may be infinite."""
        if self.mask_ref is None:
            return x
        keep = self.mask_ref[0, 0, 0, g * SUBLANES + row] != 0
        return tuple(jnp.where(keep, part, 0.0) for part in x)


def _stage(blocks: Blocks, chunk_index: Any, refs: Rows, rows: Rows) -> None:
    """The chunk's rows after those that the scratch has before it."""
    for ref, row_ref in zip(refs, rows, strict=True):
        groups = blocks.groups(blocks.read(ref, chunk_index))
        row_ref[row_ref.shape[0] - groups.shape[0] :] = groups


def _row(g: Any, row: Any) -> Any:
    return g, pl.ds(row, 1)


def _before(g: Any, row: Any) -> Any:
    """Where the token before is, in rows with a group before those of the chunk."""
    shifted = row + SUBLANES - 1
    # Shifts, because lowering a division asks which TPU is there, and ahead of time none is.
    return _row(g + (shifted >> 3), shifted & SUBLANES - 1)


def _last_token(blocks: Blocks) -> Any:
    """Where the rows of the last chunk have token T - 1."""
    last = (blocks.length - 1) % blocks.chunk
    return last // SUBLANES, slice(last % SUBLANES, last % SUBLANES + 1)


def _diagonal_forward(*refs, scan, compiled):
    (b_refs, a_refs, initial_refs), refs = scan.take(refs, True, True, True)
    mask_refs, refs = refs[: scan.masked], refs[scan.masked :]
    (h_refs, final_refs, b_rows, h_rows, a_rows), _ = scan.take(
        refs, True, True, True, True, not scan.constant
    )
    blocks, t = scan.blocks, pl.program_id(1)
    here, _ = blocks.places(pl.program_id(2))
    at = (0, slice(None), here)

    @pl.when(t == 0)
    def _():
        _write(final_refs, at, _read(initial_refs, at))

    chunk = _Chunk(scan, t, a_refs, mask_refs, a_rows)
    _stage(blocks, t, b_refs, b_rows)

    def token(g, row, h):
        now = _row(g, row)
        h = _add(_times(chunk.factor(g, row), chunk.kept(h, g, row)), _read(b_rows, now))
        _write(h_rows, now, h)
        return h

    h = blocks.loop(token, _read(final_refs, at), stretch=2, compiled=compiled)
    _write(final_refs, at, h)
    for h_ref, rows in zip(h_refs, h_rows, strict=True):
        h_ref[0] = rows[...].reshape(h_ref.shape[1:]).astype(h_ref.dtype)

    @pl.when(t == blocks.chunks - 1)
    def _():
        _write(final_refs, at, _read(h_rows, _last_token(blocks)))


def _diagonal_backward(*refs, scan, compiled):
    (h_refs, a_refs, dh_refs, edge_refs, initial_refs, dfinal_refs), refs = scan.take(
        refs, True, True, True, True, True, True
    )
    mask_refs, refs = refs[: scan.masked], refs[scan.masked :]
    (db_refs, da_refs, dinitial_refs), refs = scan.take(refs, True, True, True)
    # The gradients take the places of what they are made of: g_t that of dh_t, da_t that of h_t.
    (h_rows, g_rows, a_rows), _ = scan.take(refs, True, True, not scan.constant)
    blocks, t = scan.blocks, pl.program_id(1)
    here, _ = blocks.places(pl.program_id(2))
    at, chunk_index = (0, slice(None), here), blocks.chunks - 1 - t
    zeros = (jnp.zeros((1, blocks.lanes), jnp.float32),) * scan.parts
    chunk = _Chunk(scan, chunk_index, a_refs, mask_refs, a_rows)
    _stage(blocks, chunk_index, dh_refs, g_rows)
    _stage(blocks, chunk_index, h_refs, h_rows)
    # In the group before those of the chunk, the last row is the state before it.
    edge = tuple(ref[0, -1:] for ref in edge_refs)
    first = chunk_index == 0
    before = (
        jnp.where(first, initial, other)
        for initial, other in zip(_read(initial_refs, at), edge, strict=True)
    )
    _write(h_rows, _row(0, SUBLANES - 1), tuple(before))

    @pl.when(t == 0)
    def _():
        last = _last_token(blocks)
        dlast = _add(_read(g_rows, last), _read(dfinal_refs, at))
        _write(g_rows, last, dlast)
        _write(dinitial_refs, at, zeros)
        if scan.constant:
            _write(da_refs, at, zeros)

    def retreat(g, row, carry):
        ag, da = carry  # conj(a_{t+1}) g_{t+1}; of a constant factor, its gradient
        now = _row(g, row)
        g_t = _add(_read(g_rows, now), ag)
        _write(g_rows, now, g_t)
        before = _read(h_rows, _before(g, row))
        da_t = _times(g_t, _conjugate(chunk.kept(before, g, row)))
        if scan.constant:
            da = _add(da, da_t)
        else:
            _write(h_rows, _row(g + 1, row), da_t)
        return chunk.kept(_times(_conjugate(chunk.factor(g, row)), g_t), g, row), da

    carry = _read(dinitial_refs, at), _read(da_refs, at) if scan.constant else zeros
    ag, da = blocks.loop(retreat, carry, reverse=True, stretch=2, compiled=compiled)
    _write(dinitial_refs, at, ag)
    if scan.constant:
        _write(da_refs, at, da)
    rows = [(db_refs, g_rows)]
    rows += [] if scan.constant else [(da_refs, h_rows)]
    for of_number, rows_of_number in rows:
        for ref, rows_ref in zip(of_number, rows_of_number, strict=True):
            of_chunk = rows_ref[rows_ref.shape[0] - blocks.chunk // SUBLANES :]
            ref[0] = of_chunk.reshape(ref.shape[1:]).astype(ref.dtype)
