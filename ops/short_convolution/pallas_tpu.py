"""Short convolution on TPU: inputs are read once and outputs written once, chunk by chunk.

With lags l = 0 .. W - 1 and m_{t,l} = 1 where token t has l tokens of its segment before it, else
0:

    y_t = sum_l w_{W-1-l} x_{t-l} m_{t,l}
    dx_s = sum_l w_{W-1-l} dy_{s+l} m_{s+l,l}        dw_{W-1-l} = sum_bs x_s dy_{s+l} m_{s+l,l}

Forward runs from the first chunk to the last and keeps the last inputs of the one before, backward
from the last to the first and keeps the first cotangents of the one after. A shift by l tokens is a
load from fast memory at another row. What the W - 1 inputs before the first token give and get, and
the final state, concern a few rows and are left to XLA.

Why a kernel: for a v6e, at (B, T, D, W) = (8, 2048, 1536, 4), XLA's form of `chunked.py` moves 3.0
times the bytes of inputs and outputs forward and 14 times backward in bfloat16 (it writes float32
copies and shifted ones), 1.0 and 4.0 times in float32, by the cost analysis of the programs
compiled ahead of time with libtpu 0.0.42.1; the kernels 1.0."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..framework import segments
from ..tpu.blocks import LANES
from ..tpu.channels import SUBLANES, Blocks, call, cut, pad_channels
from . import xla


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes. chunk: tokens; lanes: channels at most; rows: tokens whose sums
    stay in registers."""

    chunk: int = 256
    lanes: int = 512
    rows: int = 64


TUNING = Tuning()


@dataclass(frozen=True)
class _Convolution:
    """What is static. beside: W - 1, up to a multiple of 8: the rows that a chunk needs from the
    one beside it."""

    blocks: Blocks
    taps: int
    segments: bool

    @property
    def beside(self) -> int:
        return SUBLANES * pl.cdiv(self.taps - 1, SUBLANES)

    @property
    def rows(self) -> int:
        return self.blocks.chunk + self.beside

    def pieces(self) -> list[tuple[int, int]]:
        """First row and number of rows of the chunk's pieces."""
        chunk = self.blocks.chunk
        starts = range(0, chunk, TUNING.rows)
        return [(start, min(TUNING.rows, chunk - start)) for start in starts]


def forward(x, w, initial_state, segment_ids, *, interpret=False):
    """Shapes as in `api.py`; returns y and the final state in float32."""
    conv, depth_BT = _convolution(x, w, segment_ids)
    blocks, before = conv.blocks, w.shape[0] - 1
    history = pad_channels(initial_state.astype(jnp.float32))
    history = jnp.pad(history, ((0, 0), (conv.beside - before, 0), (0, 0)))
    (y,) = call(
        functools.partial(_convolution_forward, conv=conv),
        blocks,
        [
            (pad_channels(x), blocks.tokens()),
            (_taps(w), blocks.constant(conv.taps)),
            *([(history, blocks.sequence(conv.beside))] if conv.beside else []),
            *_depths(depth_BT, conv, after=0),
        ],
        [(_like(x, blocks), blocks.tokens())],
        [
            pltpu.VMEM((conv.rows, blocks.lanes), jnp.float32),
            *_kept(conv),
            *_columns(conv, blocks.chunk),
        ],
        interpret=interpret,
    )
    last = x[:, max(0, x.shape[1] - before) :].astype(jnp.float32)
    final = jnp.concatenate([initial_state.astype(jnp.float32), last], 1)
    final = _of_last_segment(final[:, final.shape[1] - before :], depth_BT)
    # Exact: the caller casts y to x's dtype again.
    return y[:, :, : x.shape[2]].astype(jnp.float32), final


def backward(x, w, initial_state, segment_ids, dy, dfinal_state, *, interpret=False):
    """Cotangents of x, w and initial_state, in float32."""
    conv, depth_BT = _convolution(x, w, segment_ids)
    blocks, (taps, channels), length = conv.blocks, w.shape, x.shape[1]
    dy = dy.astype(x.dtype)  # y was cast to it, so that its cotangent is exact in it
    tokens = blocks.tokens(reverse=True)
    rows = taps * SUBLANES
    dx, dw = call(
        functools.partial(_convolution_backward, conv=conv),
        blocks,
        [
            (pad_channels(x), tokens),
            (pad_channels(dy), tokens),
            (_taps(w), blocks.constant(taps)),
            *_depths(depth_BT, conv, after=conv.beside, reverse=True),
        ],
        [
            (_like(x, blocks), tokens),
            (
                jax.ShapeDtypeStruct((blocks.batch, rows, blocks.width), jnp.float32),
                blocks.sequence(rows),
            ),
        ],
        [
            pltpu.VMEM((conv.rows, blocks.lanes), jnp.float32),
            *_kept(conv),
            *_columns(conv, conv.rows),
        ],
        interpret=interpret,
    )
    dx = dx[:, :, :channels]
    dw = dw.reshape(blocks.batch, taps, SUBLANES, -1).sum((0, 2))[:, :channels]
    if taps == 1:
        return dx.astype(jnp.float32), dw, jnp.zeros_like(initial_state, jnp.float32)

    first = min(taps - 1, length)  # tokens that read the initial state
    _, dw_initial, dinitial = xla.backward(
        jnp.zeros_like(x[:, :first]),
        w,
        initial_state,
        None if segment_ids is None else segment_ids[:, :first],
        dy[:, :first].astype(jnp.float32),
        jnp.zeros_like(initial_state, jnp.float32),
    )
    dlast = _of_last_segment(dfinal_state, depth_BT)
    # In dx's dtype, in place: as a sum in float32 it would pass all of dx through memory again.
    tail = dx[:, length - first :].astype(jnp.float32) + dlast[:, taps - 1 - first :]
    dx = dx.at[:, length - first :].set(tail.astype(x.dtype))
    dinitial = dinitial.at[:, length:].add(dlast[:, : taps - 1 - first])
    return dx.astype(jnp.float32), dw + dw_initial, dinitial


def _convolution(x, w, segment_ids) -> tuple[_Convolution, jax.Array | None]:
    """And how many tokens of its segment, W - 1 at most, are before each [B, T]; those before the
    first token count."""
    blocks = cut(x, TUNING.chunk, TUNING.lanes)
    conv = _Convolution(blocks, w.shape[0], segment_ids is not None)
    if segment_ids is None:
        return conv, None
    keep_BT, length = segments.continues(segment_ids).astype(jnp.int32), x.shape[1]
    depth_BT = jnp.zeros_like(keep_BT)
    for lag in reversed(range(w.shape[0] - 1)):
        ahead = jnp.pad(keep_BT, ((0, 0), (lag, 0)), constant_values=1)[:, :length]
        depth_BT = ahead * (1 + depth_BT)
    return conv, depth_BT


def _of_last_segment(x_BWD: jax.Array, depth_BT: jax.Array | None) -> jax.Array:
    """The last W - 1 inputs, or their cotangents; zero where they lie before the last token's
    segment."""
    if depth_BT is None:
        return x_BWD
    lag = jnp.arange(x_BWD.shape[1] - 1, -1, -1)
    return jnp.where((depth_BT[:, -1:] >= lag[None, :])[:, :, None], x_BWD, 0.0)


def _depths(depth_BT, conv: _Convolution, after: int, reverse: bool = False) -> list:
    """[B, chunks, 1, C + after]: of the tokens of a chunk, and of `after` more."""
    if depth_BT is None:
        return []
    blocks = conv.blocks
    padding = ((0, 0), (0, blocks.chunks * blocks.chunk - blocks.length))
    depth = jnp.pad(depth_BT.astype(jnp.float32), padding)
    depth = depth.reshape(blocks.batch, blocks.chunks, 1, blocks.chunk)
    following = [
        jnp.pad(depth, ((0, 0), (0, i), (0, 0), (0, 0)))[:, i:]
        for i in range(1 + pl.cdiv(after, blocks.chunk))
    ]
    array = jnp.concatenate(following, axis=-1)[..., : blocks.chunk + after]
    return [(array, blocks.shared(array, reverse))]


def _taps(w: jax.Array) -> jax.Array:
    return pad_channels(w.astype(jnp.float32))


def _like(x: jax.Array, blocks: Blocks) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:2], blocks.width), x.dtype)


def _kept(conv: _Convolution) -> list[Any]:
    """The rows beside the next chunk, of all channels."""
    if not conv.beside:
        return []
    return [pltpu.VMEM((conv.beside, conv.blocks.width), jnp.float32)]


def _columns(conv: _Convolution, rows: int) -> list[Any]:
    return [pltpu.VMEM((rows, LANES), jnp.float32)] if conv.segments else []


def _spread(depth_ref: Any, column_ref: Any) -> None:
    """A row of depths as a column, repeated over lanes: for all blocks of channels of a chunk."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        rows = column_ref.shape[0]
        column_ref[...] = jnp.broadcast_to(depth_ref[0, 0], (LANES, rows)).T


def _within(x: jax.Array, column_refs: Any, rows: slice, lag: int) -> jax.Array:
    """x [rows, 128], zero for tokens whose segment began less than `lag` tokens before."""
    if not column_refs or lag == 0:
        return x
    return jnp.where(column_refs[0][rows] >= lag, x, 0.0)


def _convolution_forward(x_ref, w_ref, *refs, conv, compiled):
    del compiled  # there is no loop
    initial_refs, refs = refs[: conv.beside > 0], refs[conv.beside > 0 :]
    depth_refs, refs = refs[: conv.segments], refs[conv.segments :]
    y_ref, z_ref, *refs = refs
    history_refs, column_refs = refs[: conv.beside > 0], refs[conv.beside > 0 :]
    blocks, beside, t = conv.blocks, conv.beside, pl.program_id(1)
    here, places = blocks.places(pl.program_id(2))
    for depth_ref, column_ref in zip(depth_refs, column_refs, strict=True):
        _spread(depth_ref, column_ref)

    z_ref[beside:] = blocks.read(x_ref, t)
    for initial_ref, history_ref in zip(initial_refs, history_refs, strict=True):
        initial = initial_ref[0, :, here]
        z_ref[:beside] = jnp.where(t == 0, initial, history_ref[:, here])
        history_ref[:, here] = z_ref[blocks.chunk :]

    for tile, place in zip(blocks.tiles, places, strict=True):
        w = w_ref[:, place]
        for start, count in conv.pieces():
            y = jnp.zeros((count, LANES), jnp.float32)
            for lag in range(conv.taps):
                first = beside + start - lag
                z = z_ref[first : first + count, tile]
                z = _within(z, column_refs, slice(start, start + count), lag)
                y = y + w[conv.taps - 1 - lag][None] * z
            y_ref[0, start : start + count, tile] = y.astype(y_ref.dtype)


def _convolution_backward(x_ref, dy_ref, w_ref, *refs, conv, compiled):
    del compiled
    depth_refs, refs = refs[: conv.segments], refs[conv.segments :]
    dx_ref, dw_ref, dz_ref, *refs = refs
    next_refs, column_refs = refs[: conv.beside > 0], refs[conv.beside > 0 :]
    blocks, chunk, t = conv.blocks, conv.blocks.chunk, pl.program_id(1)
    here, places = blocks.places(pl.program_id(2))
    for depth_ref, column_ref in zip(depth_refs, column_refs, strict=True):
        _spread(depth_ref, column_ref)

    @pl.when(t == 0)
    def _():
        dw_ref[0, :, here] = jnp.zeros((dw_ref.shape[1], blocks.lanes), jnp.float32)

    at = blocks.chunks - 1 - t
    dz_ref[:chunk] = blocks.read(dy_ref, at)
    for next_ref in next_refs:
        dz_ref[chunk:] = jnp.where(t == 0, 0.0, next_ref[:, here])
        next_ref[:, here] = dz_ref[: conv.beside]

    x = blocks.read(x_ref, at)
    for tile, place in zip(blocks.tiles, places, strict=True):
        w = w_ref[:, place]
        for start, count in conv.pieces():
            dx = jnp.zeros((count, LANES), jnp.float32)
            for lag in range(conv.taps):
                rows, tap = slice(start + lag, start + lag + count), conv.taps - 1 - lag
                dy = _within(dz_ref[rows, tile], column_refs, rows, lag)
                dx = dx + w[tap][None] * dy
                products = (x[start : start + count, tile] * dy).reshape(-1, 8, LANES)
                of_tap = slice(SUBLANES * tap, SUBLANES * (tap + 1))
                dw_ref[0, of_tap, place] += products.sum(0)
            dx_ref[0, start : start + count, tile] = dx.astype(dx_ref.dtype)
