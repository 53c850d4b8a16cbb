"""Selective scan on NVIDIA GPUs: a program walks over time with the states of its channels in registers.

    h_t = a_t h_{t-1} + B_t u_t      u = delta x      a = e or 2 e - 1, e = exp(delta A)      y_t = sum_n h_t C_t + D x

A program is a warp with a tile of 16 channels (8, where 16 give too few programs or N > 32) by N states. The lowering
puts four consecutive states of a channel into a thread, so that loads of A and of states are whole, a token's B_t and
C_t are one short vector each, and the sum over n is a few additions and, for N = 16, two exchanges between threads.

One token follows another. A scan over tokens inside a block, as in the authors' CUDA kernel, fills the chip where
channels are few, at two to three times the multiplications and with a transposition of x, whose channels lie together
in memory; here fewer channels per program and then parts of time (`pallas_gpu_scan.py`) do that. Exponentials bind
forward: one for each token, channel and state, 16 in a clock of a multiprocessor, which at N = 16 is one token of one
channel, for which memory has 20 bytes then and needs 6 to 12.

Backward, with g_t the gradient of h_t, k_t zero where a segment starts, and h_{t-1} standing for k_t h_{t-1}:

    g_t = C_t dy_t + k_{t+1} a_{t+1} g_{t+1}      dw_t = g_t h_{t-1} e_t (twice that for a = 2 e - 1), of w = delta A
    dC_t = sum_d h_t dy_t                         dB_t = sum_d g_t u_t
    du_t = sum_n B_t g_t                          dA = sum_bt delta_t dw_t
    dx_t = delta_t du_t + D dy_t                  ddelta_t = x_t du_t + sum_n A dw_t           dD = sum_bt dy_t x_t

A first kernel leaves the states at the starts of chunks of 64 tokens. A program then takes chunk after chunk from the
last to the first: it walks through one, leaving the state before every fourth token in memory of its own (of which the
second-level cache holds that of all running programs), and goes back over it four tokens at a time, the states before
each in registers. It takes three exponentials for each token and state (the first kernel one more), and is bound
nevertheless by its 25 or so other instructions.

A gate, out = y silu(z), is applied to eight tokens of 16 channels at once, which pass through memory of the program's
own: what is elementwise on tokens and channels is done once, by all threads. Backward the first kernel, which has
registers to spare, recomputes y, for dz, and writes dy = silu(z) dout for the second.

dB and dC are sums over channels. A program has two tiles, 32 channels, adds up those of a thread first and leaves
float32 sums of its channels in memory, [B, D / 32, T, N] each, which plain JAX adds up: no atomics, so that results
are deterministic, and at N = 16 4 bytes for each token and channel, less than the inputs have.

Not measured: all times, and from how many programs on a GPU is filled.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import pallas_gpu as gpu
from ..pallas_gpu_scan import (
    CHUNK,
    LANES,
    MAX_BATCH,
    barrier,
    exp2,
    keep_states,
    kept,
    lanes,
    pad_last,
    parts,
    round_up,
)
from . import around

LN_2 = math.log(2)
TURN = 8  # tokens that a walk over time loads at once
BACKWARD_TURN = 4  # tokens whose states are in registers at once, backward
ROWS = 2  # tiles of a program, backward
MAX_STATES = 64  # what fits registers
SUPPORTED = f"float32 or bfloat16, N up to {MAX_STATES}, and B up to {MAX_BATCH}"


def supports(x, delta, A, B, C, D, z, *_, **static) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED said, where jax has the lowering."""
    del D, static
    arrays = (x, delta, A, B, C, *([] if z is None else [z]))
    return (
        gpu.available()
        and A.shape[1] <= MAX_STATES
        and x.shape[0] <= MAX_BATCH
        and all(array.dtype in (jnp.float32, jnp.bfloat16) for array in arrays)
    )


def _tile(states: int) -> int:
    """N up to a power of two."""
    return 1 << (states - 1).bit_length()


@dataclass(frozen=True)
class Sizes:
    """What is static in a kernel.

    width: channels, padded; states: N, padded to a power of two; row: channels of a tile; rows: tiles of a program;
    parts: of time.
    """

    batch: int
    length: int
    channels: int
    width: int
    states: int
    rows: int
    row: int
    parts: int
    negative: bool

    @property
    def blocks(self) -> int:
        return self.width // (self.rows * self.row)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks * self.parts, self.batch

    @property
    def all_states(self) -> gpu.Span:
        return gpu.span(0, self.states, self.states, True)

    def place(self) -> tuple[Any, Any, Any, list[gpu.Span]]:
        """Batch, part, block and the channels of each of its rows."""
        x, b = pl.program_id(0), pl.program_id(1)
        block, part = x % self.blocks, x // self.blocks
        first = block * self.rows * self.row
        channels = [
            gpu.span(first + r * self.row, self.row, self.width, True)
            for r in range(self.rows)
        ]
        return b, part, block, channels

    @property
    def turns(self) -> int:
        """Turns of tokens of a whole sequence."""
        return pl.cdiv(self.length, TURN)

    def of_one_tile(self) -> "Sizes":
        """For programs of one tile."""
        return replace(self, rows=1, row=lanes(self.batch, self.channels, self.states))

    def chunk_bounds(self, part: Any) -> tuple[Any, Any]:
        """First chunk of a part and the first beyond it."""
        per_part = pl.cdiv(self.chunks, self.parts)
        first = jnp.minimum(part * per_part, self.chunks)
        return first, jnp.minimum(first + per_part, self.chunks)


class Inputs(NamedTuple):
    """Arrays, or refs inside: x, delta, dy [B, T, width], A log2(e) [width, N], B, C [B, T, N], D [width]; keep [B, T]
    or None."""

    x: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    keep: Any
    dy: Any = None


def _inputs(sizes, x, delta, A, B, C, D, segment_ids, dy=None) -> Inputs:
    return Inputs(
        pad_last(x, sizes.width),
        pad_last(delta, sizes.width),
        _padded(A.astype(jnp.float32) / LN_2, sizes),
        pad_last(B, sizes.states),
        pad_last(C, sizes.states),
        None if D is None else pad_last(D.astype(jnp.float32), sizes.width),
        keep_states(segment_ids),
        None if dy is None else pad_last(dy, sizes.width),
    )


def _padded(x: jax.Array, sizes: Sizes) -> jax.Array:
    """[..., D, N] -> [..., width, states] in float32."""
    x = pad_last(x.astype(jnp.float32), sizes.states)
    missing = sizes.width - sizes.channels
    return (
        jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, missing), (0, 0))) if missing else x
    )


def _sizes(x, A, eigenvalue_range, rows: int, row: int) -> Sizes:
    (batch, length, channels), states = x.shape, _tile(A.shape[1])
    width = round_up(channels, rows * row)
    return Sizes(
        batch,
        length,
        channels,
        width,
        states,
        rows,
        row,
        parts(length, batch * width // (rows * row)),
        eigenvalue_range == (-1, 1),
    )


@dataclass(frozen=True)
class Walk:
    """A program at work: its place, the factors of its channels, and tokens by their number."""

    sizes: Sizes
    inputs: Inputs
    compiled: bool
    b: Any
    channels: list[gpu.Span]

    def token(self, t: Any) -> Any:
        """t, or the nearest token that there is."""
        return jnp.clip(t, 0, self.sizes.length - 1)

    def valid(self, t: Any, value: Any, otherwise: float) -> Any:
        """What a token that does not exist has instead."""
        if self.sizes.length % CHUNK == 0:
            return value
        return jnp.where(t < self.sizes.length, value, otherwise)

    def rows(self, ref: Any, t: Any) -> list[jax.Array]:
        """x_t, delta_t or dy_t of each row [row] in float32; past the end zero, which leaves the state alone."""
        rows = [gpu.load(ref, self.b, self.token(t), c) for c in self.channels]
        return [self.valid(t, row.astype(jnp.float32), 0.0) for row in rows]

    def states(self, ref: Any, t: Any) -> jax.Array:
        """B_t or C_t [1, N]."""
        z = gpu.load(ref, self.b, self.token(t), self.sizes.all_states)
        return z.astype(jnp.float32)[None, :]

    def keep(self, t: Any) -> jax.Array | None:
        if self.inputs.keep is None:
            return None
        keep = gpu.load(self.inputs.keep, self.b, self.token(t))
        return self.valid(t, keep, 1)

    def exponential(self, delta: jax.Array, A: jax.Array) -> jax.Array:
        return exp2(delta[:, None] * A, self.compiled)

    def factor(self, e: jax.Array) -> jax.Array:
        return e + e - 1 if self.sizes.negative else e

    def tiles(self, ref: Any, *index: Any) -> list[jax.Array]:
        """Of each row [N, row]."""
        return [gpu.load(ref, *index, c, self.sizes.all_states) for c in self.channels]

    def write(self, ref: Any, tiles: Sequence[jax.Array], *index: Any) -> None:
        for tile, c in zip(tiles, self.channels, strict=True):
            gpu.store(ref, tile, *index, c, self.sizes.all_states)


@around.forward
def forward(x, delta, A, B, C, D, z, initial_state, segment_ids, *, eigenvalue_range):
    """Shapes as in `api.py`; returns y in x's dtype and the final state in float32."""
    (batch, _, channels), states = x.shape, A.shape[1]
    sizes = _sizes(x, A, eigenvalue_range, 1, lanes(batch, channels, states))
    inputs = _inputs(sizes, x, delta, A, B, C, D, segment_ids)
    starts = _part_starts(sizes, inputs, _padded(initial_state, sizes)[:, None], False)
    gate = None if z is None else (pad_last(z, sizes.width),)
    y, final, _ = _walk(sizes, inputs, starts, gate, y_like=x)
    return y[:, : sizes.length, :channels], final[:, -1, :channels, :states]


def _walk(
    sizes: Sizes,
    inputs: Inputs,
    starts: jax.Array,
    gate: Any,
    *,
    y_like: jax.Array | None = None,
) -> tuple[Any, jax.Array, jax.Array | None]:
    """Passes the states that enter the parts over their tokens; returns what is asked, those that leave them, and those
    that enter each chunk [B, G, width, N].

    With `y_like`, y in its dtype [B, whole turns, width], and no states of chunks; gate: (z,), or None. Without, a gate
    is (z, dout), and dz and dy are returned.
    """
    forward = y_like is not None
    turns, padded = CHUNK // TURN, sizes.turns * TURN
    whole = padded == sizes.length
    rows = sizes.batch, padded, sizes.width

    def kernel(inputs, starts, gate, out, final, of_chunks, ys, *, compiled=True):
        b, part, _, (c,) = sizes.place()
        walk = Walk(sizes, inputs, compiled, b, [c])
        (A,) = walk.tiles(inputs.A)
        D = None if inputs.D is None or not out else gpu.load(inputs.D, c)
        first, last = sizes.chunk_bounds(part)

        def read(t: Any) -> Any:
            return [
                (walk.rows(inputs.x, t + k)[0], walk.rows(inputs.delta, t + k)[0])
                for k in range(TURN)
            ]

        def apply_gate(t: Any) -> None:
            """What y of a turn [TURN, row] makes with the gate."""
            here = gpu.span(t, TURN, sizes.length, whole)
            z, *dout = (gpu.load(ref, b, here, c).astype(jnp.float32) for ref in gate)
            barrier(compiled)
            y = gpu.load(ys, b, part, gpu.span(0, TURN, TURN, True), c)
            if forward:
                tiles = [around.gate(y, z)]
            else:
                dy, per_y = around.gate_gradients(z, *dout)
                tiles = [y * per_y, dy]
            for ref, tile in zip(out, tiles, strict=True):
                gpu.store(ref, tile, b, gpu.span(t, TURN, padded, True), c)
            barrier(compiled)

        def turn(i: Any, carry: Any) -> Any:
            h, tokens = carry
            t = i * TURN
            following = read(t + TURN)
            for k, (x, delta) in enumerate(tokens):
                a = walk.factor(walk.exponential(delta, A))
                u = (delta * x)[:, None]
                h = a * kept(h, walk.keep(t + k)) + u * walk.states(inputs.B, t + k)
                if out:
                    y_t = (h * walk.states(inputs.C, t + k)).sum(1)
                    y_t = y_t if D is None else y_t + D * x
                    if gate is None:
                        gpu.store(out[0], y_t, b, t + k, c)
                    else:
                        gpu.store(ys, y_t, b, part, k, c)
            if gate is not None:
                apply_gate(t)
            return h, following

        def chunk(g: Any, carry: Any) -> Any:
            walk.write(of_chunks, [carry[0]], b, g)
            end = jnp.minimum((g + 1) * turns, sizes.turns)
            return lax.fori_loop(g * turns, end, turn, carry)

        (h,) = walk.tiles(starts, b, part)
        carry = h, read(first * CHUNK)
        if of_chunks is None:
            end = jnp.minimum(last * turns, sizes.turns)
            h, _ = lax.fori_loop(first * turns, end, turn, carry)
        else:
            h, _ = lax.fori_loop(first, last, chunk, carry)
        walk.write(final, [h], b, part)

    states = sizes.width, sizes.states
    out: tuple[Any, ...] = ()
    if y_like is not None:
        out = (jax.ShapeDtypeStruct(rows, y_like.dtype),)
    elif gate is not None:
        out = tuple(jax.ShapeDtypeStruct(rows, array.dtype) for array in gate)
    own = sizes.batch, sizes.parts, TURN, sizes.width
    out, final, of_chunks, _ = gpu.call(
        "selective_scan_forward" if forward else "selective_scan_states",
        kernel,
        sizes.grid,
        (inputs, starts, gate),
        (
            out,
            _float32(sizes.batch, sizes.parts, *states),
            None if forward else _float32(sizes.batch, sizes.chunks, *states),
            None if gate is None else _float32(*own),
        ),
        warps=1,
        interpreted=functools.partial(kernel, compiled=False),
    )
    return out[0] if forward else out, final, of_chunks


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _sum_channels(tiles: Sequence[jax.Array]) -> jax.Array:
    """[N], over the tiles first, which are in one thread."""
    total, *rest = tiles
    for tile in rest:
        total = total + tile
    return total.sum(0)


# --- States between parts and at the starts of chunks -----------------------------------------------------------------


def _part_starts(
    sizes: Sizes, inputs: Inputs, entering: jax.Array, reverse: bool
) -> jax.Array:
    """The states that enter the parts [B, parts, width, N], or reverse the gradients; entering: [B, 1, width, N]."""
    if sizes.parts == 1:
        return entering
    added, products = _summaries(sizes, inputs, reverse)
    return gpu.part_starts(jnp.multiply, products, added, entering, reverse)


def _summaries(
    sizes: Sizes, inputs: Inputs, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """What each part adds to a state, or reverse to a_t g_t, and the product of its factors [B, parts, width, N]."""
    sizes = sizes.of_one_tile()
    turns = CHUNK // TURN

    def kernel(inputs, added, products, *, compiled=True):
        b, part, _, (c,) = sizes.place()
        walk = Walk(sizes, inputs, compiled, b, [c])
        (A,) = walk.tiles(inputs.A)
        first, last = sizes.chunk_bounds(part)
        begin = last * turns - 1 if reverse else first * turns

        def read(i: Any) -> Any:
            t, ref = i * TURN, inputs.dy if reverse else inputs.x
            return [
                (walk.rows(ref, t + k)[0], walk.rows(inputs.delta, t + k)[0])
                for k in range(TURN)
            ]

        def turn(n: Any, carry: Any) -> Any:
            h, product, tokens = carry
            i = begin - n if reverse else begin + n
            following = read(i - 1 if reverse else i + 1)
            for k in reversed(range(TURN)) if reverse else range(TURN):
                (z, delta), t = tokens[k], i * TURN + k
                keep = walk.keep(t)
                a = walk.factor(walk.exponential(delta, A))
                if reverse:
                    h = kept(a * (h + z[:, None] * walk.states(inputs.C, t)), keep)
                else:
                    u = (delta * z)[:, None]
                    h = a * kept(h, keep) + u * walk.states(inputs.B, t)
                product = kept(a * product, keep)
            return h, product, following

        product = jnp.ones(A.shape, jnp.float32)
        carry = jnp.zeros(A.shape, jnp.float32), product, read(begin)
        h, product, _ = lax.fori_loop(0, (last - first) * turns, turn, carry)
        walk.write(added, [h], b, part)
        walk.write(products, [product], b, part)

    of_parts = _float32(sizes.batch, sizes.parts, sizes.width, sizes.states)
    return gpu.call(
        "selective_scan_gradient_states" if reverse else "selective_scan_states",
        kernel,
        sizes.grid,
        (inputs,),
        (of_parts, of_parts),
        warps=1,
        interpreted=functools.partial(kernel, compiled=False),
    )


# --- Backward ---------------------------------------------------------------------------------------------------------


@around.backward
def backward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    initial_state,
    segment_ids,
    dout,
    dfinal_state,
    *,
    eigenvalue_range,
):
    """Cotangents of x, delta, A, B, C, D, z (None without D, without z) and initial_state."""
    (batch, length, channels), states = x.shape, A.shape[1]
    sizes = _sizes(x, A, eigenvalue_range, ROWS, LANES)
    inputs = _inputs(sizes, x, delta, A, B, C, D, segment_ids, dout)
    starts = _part_starts(sizes, inputs, _padded(initial_state, sizes)[:, None], False)
    dz = None
    if z is not None:
        gate = pad_last(z, sizes.width), inputs.dy
        (dz, dy), _, starts = _walk(sizes.of_one_tile(), inputs, starts, gate)
        dz, inputs = dz[:, :length, :channels], inputs._replace(dy=dy)
    elif sizes.chunks > 1:
        _, _, starts = _walk(sizes.of_one_tile(), inputs, starts, None)
    ends = _part_starts(sizes, inputs, _padded(dfinal_state, sizes)[:, None], True)
    turns = CHUNK // BACKWARD_TURN
    padded = round_up(length, BACKWARD_TURN)

    def kernel(inputs, starts, ends, *outputs, compiled=True):
        dx, ddelta, dB, dC, dA, dinitial, steps, *dD = outputs
        b, part, block, channels = sizes.place()
        walk = Walk(sizes, inputs, compiled, b, channels)
        A = walk.tiles(inputs.A)
        D = [gpu.load(inputs.D, c) for c in channels] if dD else None
        first, last = sizes.chunk_bounds(part)
        tokens = range(BACKWARD_TURN)
        rows = range(ROWS)

        def read(t: Any) -> list[list[jax.Array]]:
            return [walk.rows(z, t) for z in (inputs.x, inputs.delta, inputs.dy)]

        def ahead(i: Any) -> list[list[list[jax.Array]]]:
            """x and delta of a turn."""
            return [
                [walk.rows(z, i * BACKWARD_TURN + k) for z in (inputs.x, inputs.delta)]
                for k in tokens
            ]

        def advance(h: Any, x: Any, delta: Any, t: Any) -> Any:
            """The state before token t and the one after, of each row."""
            keep, B_t = walk.keep(t), walk.states(inputs.B, t)
            a = [walk.factor(walk.exponential(delta[r], A[r])) for r in rows]
            before = [kept(h[r], keep) for r in rows]
            after = [a[r] * before[r] + (delta[r] * x[r])[:, None] * B_t for r in rows]
            return before, after

        def chunk(n: Any, carry: Any) -> Any:
            g = last - 1 - n
            here = jnp.minimum(
                turns, pl.cdiv(length, BACKWARD_TURN) - g * turns
            )  # of the last chunk, fewer

            def skip(i: Any, carry: Any) -> Any:
                h, steps_ahead = carry
                walk.write(steps, h, b, part, i)
                i += g * turns
                following = ahead(i + 1)
                for k in tokens:
                    x, delta = steps_ahead[k]
                    _, h = advance(h, x, delta, i * BACKWARD_TURN + k)
                return h, following

            h = walk.tiles(starts, b, g)
            lax.fori_loop(0, here, skip, (h, ahead(g * turns)))
            barrier(compiled)
            carry = lax.fori_loop(
                0, here, lambda i, carry: retreat(g, here - 1 - i, carry), carry
            )
            barrier(compiled)
            return carry

        def retreat(g: Any, i: Any, carry: Any) -> Any:
            ag, dA_, dD_ = map(list, carry)
            h = walk.tiles(steps, b, part, i)
            i += g * turns
            before = []
            for k in tokens:
                t = i * BACKWARD_TURN + k
                x, delta, dy = read(t)
                before_t, h = advance(h, x, delta, t)
                dC_t = _sum_channels([h[r] * dy[r][:, None] for r in rows])
                gpu.store(dC, dC_t, b, block, t, sizes.all_states)
                before.append(before_t)
            for k in reversed(tokens):
                t = i * BACKWARD_TURN + k
                keep = walk.keep(t)
                B_t, C_t = (walk.states(z, t) for z in (inputs.B, inputs.C))
                x, delta, dy = read(t)  # again, like exp: registers hold states
                dB_t = []
                for r, c in enumerate(channels):
                    x_t, delta_t, dy_t = x[r], delta[r], dy[r]
                    g_t = ag[r] + C_t * dy_t[:, None]
                    eg = walk.exponential(delta_t, A[r]) * g_t
                    eg = eg + eg if sizes.negative else eg
                    dw = eg * before[k][r]
                    ag[r] = kept(eg - g_t if sizes.negative else eg, keep)
                    dA_[r] += delta_t[:, None] * dw
                    dB_t.append((delta_t * x_t)[:, None] * g_t)
                    du = (B_t * g_t).sum(1)
                    dx_t = delta_t * du
                    if D is not None:
                        dx_t += D[r] * dy_t
                        dD_[r] += dy_t * x_t
                    ddelta_t = x_t * du + (A[r] * dw).sum(1) * LN_2
                    gpu.store(dx, dx_t, b, t, c)
                    gpu.store(ddelta, ddelta_t, b, t, c)
                gpu.store(dB, _sum_channels(dB_t), b, block, t, sizes.all_states)
            return ag, dA_, dD_

        zeros = [jnp.zeros(tile.shape, jnp.float32) for tile in A]
        no_D = [jnp.zeros((sizes.row,), jnp.float32) for _ in rows] if dD else []
        carry = walk.tiles(ends, b, part), zeros, no_D
        ag, dA_, dD_ = lax.fori_loop(0, last - first, chunk, carry)
        walk.write(dinitial, ag, b, part)
        walk.write(dA, dA_, b, part)
        for ref in dD:
            for row, c in zip(dD_, channels, strict=True):
                gpu.store(ref, row, b, part, c)

    rows = batch, padded, sizes.width
    sums = _float32(batch, sizes.blocks, padded, sizes.states)
    of_parts = batch, sizes.parts
    state = sizes.width, sizes.states
    dx, ddelta, dB, dC, dA, dinitial, _, *dD = gpu.call(
        "selective_scan_backward",
        kernel,
        sizes.grid,
        (inputs, starts, ends),
        (
            jax.ShapeDtypeStruct(rows, x.dtype),
            jax.ShapeDtypeStruct(rows, delta.dtype),
            *(sums, sums),
            *(_float32(*of_parts, *state),) * 2,
            _float32(*of_parts, turns, *state),
            *([] if D is None else [_float32(*of_parts, sizes.width)]),
        ),
        warps=max(1, sizes.states // 16),
        interpreted=functools.partial(kernel, compiled=False),
    )
    dB, dC = (z.sum(1)[:, :length, :states] for z in (dB, dC))
    return (
        dx[:, :length, :channels],
        ddelta[:, :length, :channels],
        dA.sum((0, 1))[:channels, :states],
        dB,
        dC,
        dD[0].sum((0, 1))[:channels] if dD else None,
        dz,
        dinitial[:, 0, :channels, :states],
    )
