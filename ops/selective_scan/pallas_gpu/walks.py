"""The walks over time of the selective scan's GPU kernels, and the kernels that are such a walk and
no more.

`pallas_gpu.py` has the equations.

A program is a warp with the states of its channels in registers. Tokens come in turns of eight:
those of the next turn are loaded before the work of this one.

A gate is applied to a turn of tokens at once, which pass through memory of the program's own: what
is elementwise on tokens and channels is done once, by all threads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...gpu import tiles as gpu
from ...gpu.channels import (
    CHUNK,
    barrier,
    exp2,
    keep_states,
    kept,
    lanes,
    pad_last,
    parts,
    round_up,
)
from .. import gating

LN_2 = math.log(2)
TURN = 8  # tokens that a walk over time loads at once


def _tile(states: int) -> int:
    """N up to a power of two."""
    return 1 << (states - 1).bit_length()


@dataclass(frozen=True)
class Sizes:
    """What is static in a kernel.

    width: channels, padded; states: N, padded to a power of two; row: channels of a tile; rows:
    tiles of a program;
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
    interpret: bool

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
            gpu.span(first + r * self.row, self.row, self.width, True) for r in range(self.rows)
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
    """Arrays, or refs inside: x, delta, dy [B, T, width], A log2(e) [width, N], B, C [B, T, N], D
    [width]; keep [B, T] or None."""

    x: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    keep: Any
    dy: Any = None


def make_inputs(sizes, x, delta, A, B, C, D, segment_ids, dy=None) -> Inputs:
    return Inputs(
        pad_last(x, sizes.width),
        pad_last(delta, sizes.width),
        padded(A.astype(jnp.float32) / LN_2, sizes),
        pad_last(B, sizes.states),
        pad_last(C, sizes.states),
        None if D is None else pad_last(D.astype(jnp.float32), sizes.width),
        keep_states(segment_ids),
        None if dy is None else pad_last(dy, sizes.width),
    )


def padded(x: jax.Array, sizes: Sizes) -> jax.Array:
    """[..., D, N] -> [..., width, states] in float32."""
    x = pad_last(x.astype(jnp.float32), sizes.states)
    missing = sizes.width - sizes.channels
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, missing), (0, 0))) if missing else x


def make_sizes(x, A, eigenvalue_range, rows: int, row: int, interpret: bool) -> Sizes:
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
        interpret,
    )


@dataclass(frozen=True)
class Walk:
    """A program at work: its place, the factors of its channels, and tokens by their number."""

    sizes: Sizes
    inputs: Inputs
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
        """x_t, delta_t or dy_t of each row [row] in float32; past the end zero, which leaves the
        state alone."""
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
        return exp2(delta[:, None] * A, self.sizes.interpret)

    def factor(self, e: jax.Array) -> jax.Array:
        return e + e - 1 if self.sizes.negative else e

    def tiles(self, ref: Any, *index: Any) -> list[jax.Array]:
        """Of each row [N, row]."""
        return [gpu.load(ref, *index, c, self.sizes.all_states) for c in self.channels]

    def start(self, ref: Any, g: Any) -> list[jax.Array]:
        """The states before chunk g, of each row, of [B, G, N, width]."""
        states = self.sizes.all_states
        return [gpu.load(ref, self.b, g, states, c).T for c in self.channels]

    def write(self, ref: Any, tiles: Sequence[jax.Array], *index: Any) -> None:
        for tile, c in zip(tiles, self.channels, strict=True):
            gpu.store(ref, tile, *index, c, self.sizes.all_states)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def padded_starts(starts: jax.Array, sizes: Sizes) -> jax.Array:
    """[B, G, N, D] -> [B, G, states, width] in float32."""
    starts = pad_last(starts.astype(jnp.float32), sizes.width)
    missing = sizes.states - starts.shape[2]
    return jnp.pad(starts, ((0, 0), (0, 0), (0, missing), (0, 0)))


def at_parts(sizes: Sizes, starts: jax.Array) -> jax.Array:
    """Of the states before each chunk those that enter parts [B, parts, width, N]; of a part
    without chunks any."""
    first, _ = sizes.chunk_bounds(jnp.arange(sizes.parts))
    return jnp.swapaxes(jnp.take(starts, first, axis=1, mode="clip"), 2, 3)


def along(
    sizes: Sizes,
    inputs: Inputs,
    of_parts: jax.Array,
    z: jax.Array | None,
    dtype: Any,
    keep_starts: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y [B, T to whole turns, width] in `dtype`, gated where z is given, the states that leave the
    parts, and if they are to be kept those before each chunk [B, G, N, width].

    of_parts: the states that enter them [B, parts, width, N].
    """
    gate = None if z is None else (z,)
    (y,), final, starts = _along("forward", sizes, inputs, of_parts, gate, (dtype,), keep_starts)
    return y, final, starts


def before(
    sizes: Sizes, inputs: Inputs, of_parts: jax.Array, z: jax.Array | None, keep_starts: bool
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """What the backward pass needs before it goes back: of a gate dz and dy, and the states before
    each chunk.

    With a gate `inputs.dy` is the gradient of y silu(z).
    """
    sizes = sizes.of_one_tile()
    gate = None if z is None else (z, inputs.dy)
    dtypes = () if gate is None else tuple(array.dtype for array in gate)
    of_gate, _, starts = _along(
        "states" if keep_starts else "gate", *(sizes, inputs, of_parts, gate, dtypes, keep_starts)
    )
    return of_gate, starts


def _along(
    name: str,
    sizes: Sizes,
    inputs: Inputs,
    of_parts: jax.Array,
    gate: tuple[jax.Array, ...] | None,
    dtypes: tuple[Any, ...],
    keep_starts: bool,
) -> tuple[Any, Any, Any]:
    """Passes states over the tokens of each part. dtypes: of what becomes of y: nothing, y, or with
    a gate (z, dout) dz and dy."""
    turns, padded = CHUNK // TURN, sizes.turns * TURN
    whole = padded == sizes.length
    rows = sizes.batch, padded, sizes.width

    def kernel(inputs, of_parts, gate, out, final, starts, ys):
        b, part, _, (c,) = sizes.place()
        walk = Walk(sizes, inputs, b, [c])
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
            barrier(sizes.interpret)
            y = gpu.load(ys, b, part, gpu.span(0, TURN, TURN, True), c)
            if not dout:
                tiles = [gating.gate(y, z)]
            else:
                dy, per_y = gating.gate_gradients(z, *dout)
                tiles = [y * per_y, dy]
            for ref, tile in zip(out, tiles, strict=True):
                gpu.store(ref, tile, b, gpu.span(t, TURN, padded, True), c)
            barrier(sizes.interpret)

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
            gpu.store(starts, carry[0].T, b, g, sizes.all_states, c)
            end = jnp.minimum((g + 1) * turns, sizes.turns)
            return lax.fori_loop(g * turns, end, turn, carry)

        (h,) = walk.tiles(of_parts, b, part)
        carry = h, read(first * CHUNK)
        if starts is None:
            end = jnp.minimum(last * turns, sizes.turns)
            h, _ = lax.fori_loop(first * turns, end, turn, carry)
        else:
            h, _ = lax.fori_loop(first, last, chunk, carry)
        walk.write(final, [h], b, part)

    states = sizes.width, sizes.states
    own = sizes.batch, sizes.parts, TURN, sizes.width
    out, final, starts, _ = gpu.call(
        f"selective_scan_{name}",
        kernel,
        sizes.grid,
        (inputs, of_parts, gate),
        (
            tuple(jax.ShapeDtypeStruct(rows, dtype) for dtype in dtypes),
            float32(sizes.batch, sizes.parts, *states),
            float32(sizes.batch, sizes.chunks, *states[::-1]) if keep_starts else None,
            None if gate is None else float32(*own),
        ),
        warps=1,
        interpret=sizes.interpret,
    )
    return out, final, starts


def part_starts(sizes: Sizes, inputs: Inputs, entering: jax.Array, reverse: bool) -> jax.Array:
    """The states that enter the parts [B, parts, width, N], or reverse the gradients; entering: [B,
    1, width, N]."""
    if sizes.parts == 1:
        return entering
    added, products = _summaries(sizes, inputs, reverse)
    return gpu.part_starts(jnp.multiply, products, added, entering, reverse)


def _summaries(sizes: Sizes, inputs: Inputs, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """What each part adds to a state, or reverse to a_t g_t, and the product of its factors [B,
    parts, width, N]."""
    sizes = sizes.of_one_tile()
    turns = CHUNK // TURN

    def kernel(inputs, added, products):
        b, part, _, (c,) = sizes.place()
        walk = Walk(sizes, inputs, b, [c])
        (A,) = walk.tiles(inputs.A)
        first, last = sizes.chunk_bounds(part)
        begin = last * turns - 1 if reverse else first * turns

        def read(i: Any) -> Any:
            t, ref = i * TURN, inputs.dy if reverse else inputs.x
            return [
                (walk.rows(ref, t + k)[0], walk.rows(inputs.delta, t + k)[0]) for k in range(TURN)
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

    of_parts = float32(sizes.batch, sizes.parts, sizes.width, sizes.states)
    return gpu.call(
        "selective_scan_gradient_states" if reverse else "selective_scan_states",
        kernel,
        sizes.grid,
        (inputs,),
        (of_parts, of_parts),
        warps=1,
        interpret=sizes.interpret,
    )
