"""Short convolution on TPU: inputs are read once and outputs written once, chunk by chunk.

With lags l = 0 .. W - 1 and m_{t,l} = 1 where token t has l tokens of its segment before it, else
0:

    y_t = sum_l w_{W-1-l} x_{t-l} m_{t,l}                                                (1)
    dx_s = sum_l w_{W-1-l} dy_{s+l} m_{s+l,l}                                            (2)
    dw_{W-1-l} = sum_bs x_s dy_{s+l} m_{s+l,l}                                           (3)

Forward runs from the first chunk to the last and keeps the last inputs of the one before, backward
from the last to the first and keeps the first cotangents of the one after. A shift by l tokens is a
load from fast memory at another row. With `reverse`, before and after change places. What the W - 1
inputs before the first token give and get, and the final state, concern a few rows and are left to
XLA.

Why a kernel: for a v6e, at (B, T, D, W) = (8, 2048, 1536, 4), XLA's form of `xla.py` moves 3.0
times the bytes of inputs and outputs forward and 14 times backward in bfloat16 (it writes float32
copies and shifted ones), 1.0 and 4.0 times in float32, by the cost analysis of the programs
compiled ahead of time with libtpu 0.0.42.1; the kernels 1.0."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..framework import segments
from ..tpu import channels
from ..tpu.channels import ChannelGrid
from ..tpu.kernel import LANES, SUBLANES, Input, call
from . import xla


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes. chunk: tokens; lanes: channels at most; rows: tokens whose sums
    stay in registers."""

    chunk: int = 256
    lanes: int = 512
    rows: int = 64


TUNING = Tuning()
WALKS_BACKWARDS = True


@dataclass(frozen=True)
class Convolution:
    """What is static. taps: W; segments: whether there are any."""

    grid: ChannelGrid
    taps: int
    segments: bool

    @property
    def beside(self) -> int:
        """Rows that a chunk needs from the one beside it: W - 1, up to a multiple of 8."""
        return SUBLANES * pl.cdiv(self.taps - 1, SUBLANES)

    @property
    def rows(self) -> int:
        """Of a chunk and of those beside it."""
        return self.grid.chunk + self.beside

    def stretches(self) -> list[tuple[int, int]]:
        """First row and number of rows of what a kernel has in registers at once."""
        chunk = self.grid.chunk
        starts = range(0, chunk, TUNING.rows)
        return [(start, min(TUNING.rows, chunk - start)) for start in starts]

    def chunk_rows(self, backward: bool) -> slice:
        """Where scratch [rows, L] has the chunk: behind the rows of the chunk before, or before
        those of the chunk after."""
        start = 0 if self.grid.runs_back(backward) else self.beside
        return slice(start, start + self.grid.chunk)

    def beside_rows(self, backward: bool) -> slice:
        """Where scratch [rows, L] has the rows beside the chunk."""
        chunk = self.grid.chunk
        return slice(chunk, None) if self.grid.runs_back(backward) else slice(0, self.beside)

    def edge_rows(self, backward: bool) -> slice:
        """Where scratch [rows, L] has what the next chunk needs of this one."""
        chunk = self.grid.chunk
        return slice(0, self.beside) if self.grid.runs_back(backward) else slice(chunk, None)

    def shifted(self, start: int, count: int, lag: int, backward: bool) -> slice:
        """Rows of scratch with tokens start .. start + count - 1 of the chunk, shifted by `lag`
        towards the chunk beside it."""
        first = start + lag if self.grid.runs_back(backward) else self.beside + start - lag
        return slice(first, first + count)


def forward(x, w, initial_state, segment_ids, *, reverse=False, interpret=False):
    """y and the final state in float32; shapes as in `api.py`."""
    conv, depth_BT = _convolution(x, w, segment_ids, reverse, interpret)
    grid, before = conv.grid, w.shape[0] - 1
    refs = ForwardRefs(
        x=grid.of_tokens(x),
        w=_taps(w, grid),
        initial_state=_initial_rows(initial_state, conv),
        depth=_depths(depth_BT, conv, backward=False),
        y=grid.token_output(x),
        z=pltpu.VMEM((conv.rows, grid.lanes), jnp.float32),
        edge=_edge(conv),
        column=_column(conv, grid.chunk),
    )
    y = call(functools.partial(convolution_forward, conv=conv), grid, refs).y
    last = _last(x, before, reverse).astype(jnp.float32)
    final = jnp.concatenate([initial_state.astype(jnp.float32), last], 1)
    final = _of_last_segment(final[:, final.shape[1] - before :], depth_BT, reverse)
    # Exact: the caller casts y to x's dtype again.
    return y[:, :, : x.shape[2]].astype(jnp.float32), final


def backward(x, w, initial_state, segment_ids, dy, dfinal_state, *, reverse=False, interpret=False):
    """Gradients of x, w and initial_state, in float32."""
    conv, depth_BT = _convolution(x, w, segment_ids, reverse, interpret)
    grid, (taps, size), length = conv.grid, w.shape, x.shape[1]
    dy = dy.astype(x.dtype)  # y was cast to it, so that its cotangent is exact in it
    refs = BackwardRefs(
        x=grid.of_tokens(x, backward=True),
        dy=grid.of_tokens(dy, backward=True),
        w=_taps(w, grid),
        depth=_depths(depth_BT, conv, backward=True),
        dx=grid.token_output(x, backward=True),
        dw=grid.sequence_output(taps * SUBLANES),
        dz=pltpu.VMEM((conv.rows, grid.lanes), jnp.float32),
        edge=_edge(conv),
        column=_column(conv, conv.rows),
    )
    results = call(functools.partial(convolution_backward, conv=conv), grid, refs)
    dx = results.dx[:, :, :size]
    dw = results.dw.reshape(grid.batch, taps, SUBLANES, -1).sum((0, 2))[:, :size]
    if taps == 1:
        return dx.astype(jnp.float32), dw, jnp.zeros_like(initial_state, jnp.float32)

    count = min(taps - 1, length)  # of tokens that read the initial state
    first_ids = None if segment_ids is None else _first(segment_ids, count, reverse)
    _, dw_initial, dinitial = xla.backward(
        jnp.zeros_like(_first(x, count, reverse)),
        w,
        initial_state,
        first_ids,
        _first(dy, count, reverse).astype(jnp.float32),
        jnp.zeros_like(initial_state, jnp.float32),
    )
    dlast = _of_last_segment(dfinal_state, depth_BT, reverse)
    # In dx's dtype, in place: as a sum in float32 it would pass all of dx through memory again.
    tail = _last(dx, count, reverse).astype(jnp.float32) + dlast[:, taps - 1 - count :]
    tail = tail.astype(x.dtype)
    dx = dx.at[:, :count].set(tail[:, ::-1]) if reverse else dx.at[:, length - count :].set(tail)
    dinitial = dinitial.at[:, length:].add(dlast[:, : taps - 1 - count])
    return dx.astype(jnp.float32), dw + dw_initial, dinitial


def _convolution(
    x, w, segment_ids, reverse: bool, interpret: bool
) -> tuple[Convolution, jax.Array | None]:
    """And how many tokens of its segment, W - 1 at most, are before each [B, T]; those before the
    first token count."""
    grid = channels.cut(x, TUNING.chunk, TUNING.lanes, reverse=reverse, interpret=interpret)
    conv = Convolution(grid, w.shape[0], segment_ids is not None)
    if segment_ids is None:
        return conv, None
    keep_BT, length = segments.continues(segment_ids, reverse=reverse).astype(jnp.int32), x.shape[1]
    depth_BT = jnp.zeros_like(keep_BT)
    for lag in reversed(range(w.shape[0] - 1)):
        beside = (0, lag) if reverse else (lag, 0)
        ahead = jnp.pad(keep_BT, ((0, 0), beside), constant_values=1)
        ahead = ahead[:, lag:] if reverse else ahead[:, :length]
        depth_BT = ahead * (1 + depth_BT)
    return conv, depth_BT


def _first(x: jax.Array, count: int, reverse: bool) -> jax.Array:
    """The first `count` tokens [B, count, ...] that the recurrence takes, in its order."""
    return x[:, x.shape[1] - count :][:, ::-1] if reverse else x[:, :count]


def _last(x: jax.Array, count: int, reverse: bool) -> jax.Array:
    """The last tokens that the recurrence takes, `count` at most, in its order."""
    return x[:, :count][:, ::-1] if reverse else x[:, max(0, x.shape[1] - count) :]


def _of_last_segment(x_BWD: jax.Array, depth_BT: jax.Array | None, reverse: bool) -> jax.Array:
    """The last W - 1 inputs, or their cotangents; zero where they lie before the last token's
    segment."""
    if depth_BT is None:
        return x_BWD
    lag = jnp.arange(x_BWD.shape[1] - 1, -1, -1)
    depth_B1 = depth_BT[:, :1] if reverse else depth_BT[:, -1:]
    return jnp.where((depth_B1 >= lag[None, :])[:, :, None], x_BWD, 0.0)


def _initial_rows(initial_state: jax.Array, conv: Convolution) -> Input | None:
    """The initial state as rows [B, beside, width] that lie before the first token, or with
    `reverse` behind the last one."""
    if not conv.beside:
        return None
    rows = conv.grid.widened(initial_state.astype(jnp.float32))
    missing = conv.beside - rows.shape[1]
    if conv.grid.reverse:
        rows = jnp.pad(rows[:, ::-1], ((0, 0), (0, missing), (0, 0)))
    else:
        rows = jnp.pad(rows, ((0, 0), (missing, 0), (0, 0)))
    return conv.grid.of_sequences(rows)


def _depths(depth_BT: jax.Array | None, conv: Convolution, backward: bool) -> Input | None:
    """[B, chunks, 1, C or rows]: depths of the outputs that a chunk meets; backward also of those
    beside it."""
    if depth_BT is None:
        return None
    grid, beside = conv.grid, conv.beside if backward else 0
    padding = ((0, 0), (0, grid.chunks * grid.chunk - grid.length))
    depth = jnp.pad(depth_BT.astype(jnp.float32), padding)
    depth = depth.reshape(grid.batch, grid.chunks, 1, grid.chunk)

    def neighbour(i: int) -> jax.Array:
        """Depths of the chunk that is i chunks further in the direction of the recurrence."""
        if grid.reverse:
            return jnp.pad(depth, ((0, 0), (i, 0), (0, 0), (0, 0)))[:, : grid.chunks]
        return jnp.pad(depth, ((0, 0), (0, i), (0, 0), (0, 0)))[:, i:]

    neighbours = [neighbour(i) for i in range(1 + pl.cdiv(beside, grid.chunk))]
    rows = grid.chunk + beside
    if grid.reverse:
        array = jnp.concatenate(neighbours[::-1], axis=-1)[..., -rows:]
    else:
        array = jnp.concatenate(neighbours, axis=-1)[..., :rows]
    return Input(array, grid.shared(array, backward))


def _taps(w: jax.Array, grid: ChannelGrid) -> Input:
    return grid.constant(grid.widened(w.astype(jnp.float32)))


def _edge(conv: Convolution) -> Any:
    """Scratch for the rows beside the next chunk, of all channels."""
    return pltpu.VMEM((conv.beside, conv.grid.width), jnp.float32) if conv.beside else None


def _column(conv: Convolution, rows: int) -> Any:
    return pltpu.VMEM((rows, LANES), jnp.float32) if conv.segments else None


# --- Inside a kernel


def _spread(depth_ref: Any, column_ref: Any) -> None:
    """Writes a row of depths as a column, repeated over lanes: for all blocks of channels of a
    chunk."""
    if depth_ref is None:
        return

    @pl.when(pl.program_id(2) == 0)
    def _():
        rows = column_ref.shape[0]
        column_ref[...] = jnp.broadcast_to(depth_ref[0, 0], (LANES, rows)).T


def _within(x: jax.Array, column_ref: Any, rows: slice, lag: int) -> jax.Array:
    """x [rows, 128], zero for tokens whose segment began less than `lag` tokens before."""
    if column_ref is None or lag == 0:
        return x
    return jnp.where(column_ref[rows] >= lag, x, 0.0)


class ForwardRefs(NamedTuple):
    x: Any  # [1, C, L]
    w: Any  # [W, width]
    initial_state: Any  # [1, beside, width], None for one tap
    depth: Any  # [1, 1, 1, C], None without segments
    y: Any  # [1, C, L]
    z: Any  # the chunk's inputs and those beside it [rows, L]
    edge: Any  # carry [beside, width], None for one tap
    column: Any  # depths [C, 128], None without segments


def convolution_forward(refs: ForwardRefs, *, conv: Convolution) -> None:
    grid, t = conv.grid, pl.program_id(1)
    here, places = grid.places(pl.program_id(2))
    _spread(refs.depth, refs.column)

    refs.z[conv.chunk_rows(backward=False)] = grid.read(refs.x, grid.chunk_index(t))
    if conv.beside:
        initial = refs.initial_state[0, :, here]  # [beside, L]
        beside = conv.beside_rows(backward=False)
        refs.z[beside] = jnp.where(t == 0, initial, refs.edge[:, here])
        past = grid.length % grid.chunk
        if grid.reverse and past:  # the initial state is behind token T - 1, inside the chunk

            @pl.when(t == 0)
            def _():
                refs.z[past : past + conv.beside] = initial

        refs.edge[:, here] = refs.z[conv.edge_rows(backward=False)]

    for tile, place in zip(grid.tiles, places, strict=True):
        w = refs.w[:, place]  # [W, 128]
        for start, count in conv.stretches():
            y = jnp.zeros((count, LANES), jnp.float32)
            for lag in range(conv.taps):
                z = refs.z[conv.shifted(start, count, lag, backward=False), tile]  # [count, 128]
                z = _within(z, refs.column, slice(start, start + count), lag)
                y = y + w[conv.taps - 1 - lag][None] * z  # Eq. 1
            refs.y[0, start : start + count, tile] = y.astype(refs.y.dtype)


class BackwardRefs(NamedTuple):
    x: Any  # [1, C, L]
    dy: Any  # [1, C, L]
    w: Any  # [W, width]
    depth: Any  # [1, 1, 1, rows], None without segments
    dx: Any  # [1, C, L]
    dw: Any  # carry, 8 partial sums of each tap [1, 8 W, width]
    dz: Any  # the chunk's cotangents and those beside it [rows, L]
    edge: Any  # carry [beside, width], None for one tap
    column: Any  # depths [rows, 128], None without segments


def convolution_backward(refs: BackwardRefs, *, conv: Convolution) -> None:
    grid, t = conv.grid, pl.program_id(1)
    here, places = grid.places(pl.program_id(2))
    _spread(refs.depth, refs.column)

    @pl.when(t == 0)
    def _():
        refs.dw[0, :, here] = jnp.zeros((refs.dw.shape[1], grid.lanes), jnp.float32)

    chunk_index = grid.chunk_index(t, backward=True)
    refs.dz[conv.chunk_rows(backward=True)] = grid.read(refs.dy, chunk_index)
    if conv.beside:
        refs.dz[conv.beside_rows(backward=True)] = jnp.where(t == 0, 0.0, refs.edge[:, here])
        refs.edge[:, here] = refs.dz[conv.edge_rows(backward=True)]

    x = grid.read(refs.x, chunk_index)  # [C, L]
    for tile, place in zip(grid.tiles, places, strict=True):
        w = refs.w[:, place]  # [W, 128]
        for start, count in conv.stretches():
            dx = jnp.zeros((count, LANES), jnp.float32)
            for lag in range(conv.taps):
                rows, tap = conv.shifted(start, count, lag, backward=True), conv.taps - 1 - lag
                dy = _within(refs.dz[rows, tile], refs.column, rows, lag)  # [count, 128]
                dx = dx + w[tap][None] * dy  # Eq. 2
                products = (x[start : start + count, tile] * dy).reshape(-1, SUBLANES, LANES)
                of_tap = slice(SUBLANES * tap, SUBLANES * (tap + 1))
                refs.dw[0, of_tap, place] += products.sum(0)  # Eq. 3
            refs.dx[0, start : start + count, tile] = dx.astype(refs.dx.dtype)
