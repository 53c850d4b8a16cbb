"""Selective scan on GPU: a program at work, and the kernels that walk forward over time, or back
without storing gradients of tokens (`__init__.py` has the equations).

A gate is applied to a turn of tokens at once, for which y passes through memory of the program's
own: what is elementwise on tokens and channels is then computed once, by all threads."""

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
    keep_of,
    lanes,
    pad_last,
    part_count,
    reset,
    round_up,
)
from .. import gating

LN_2 = math.log(2)
TURN = 8  # tokens of a turn, forward

Tiles = list[jax.Array]  # one for each tile of a program's channels


@dataclass(frozen=True)
class Sizes:
    """What is static in a kernel."""

    batch: int
    length: int
    channels: int
    width: int  # channels, padded to whole programs
    states: int  # N, padded to a power of two
    tiles: int  # of channels in a program
    lanes: int  # channels of a tile
    parts: int  # of time
    negative: bool  # a = 2 e - 1
    reverse: bool  # time runs from the last token to the first
    interpret: bool

    @property
    def blocks(self) -> int:
        """Programs along channels."""
        return self.width // (self.tiles * self.lanes)

    @property
    def chunks(self) -> int:
        """G."""
        return pl.cdiv(self.length, CHUNK)

    @property
    def turns(self) -> int:
        """Turns of the whole sequence, forward."""
        return pl.cdiv(self.length, TURN)

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks * self.parts, self.batch

    @property
    def all_states(self) -> gpu.Span:
        return gpu.span(0, self.states, self.states, True)

    def one_tile(self) -> "Sizes":
        """The sizes for programs of one tile."""
        return replace(self, tiles=1, lanes=lanes(self.batch, self.channels, self.states))

    def part_chunks(self, part: Any) -> tuple[Any, Any]:
        """The first chunk of a part, and the first after it."""
        chunks = pl.cdiv(self.chunks, self.parts)
        first = jnp.minimum(part * chunks, self.chunks)
        return first, jnp.minimum(first + chunks, self.chunks)

    def tokens_of(self, x: jax.Array) -> jax.Array:
        """[.., T, X] of an output [.., T padded to whole turns, X]."""
        return x[..., -self.length :, :] if self.reverse else x[..., : self.length, :]


def make_sizes(
    x: jax.Array,
    A: jax.Array,
    eigenvalue_range: tuple[int, int],
    *,
    tiles: int,
    lanes: int,
    reverse: bool,
    interpret: bool,
) -> Sizes:
    batch, length, channels = x.shape
    width = round_up(channels, tiles * lanes)
    return Sizes(
        batch,
        length,
        channels,
        width,
        states=1 << (A.shape[1] - 1).bit_length(),
        tiles=tiles,
        lanes=lanes,
        parts=part_count(length, batch * width // (tiles * lanes)),
        negative=eigenvalue_range == (-1, 1),
        reverse=reverse,
        interpret=interpret,
    )


class KernelInputs(NamedTuple):
    """The op's inputs with padded channels and states, as arrays or as refs."""

    x: Any  # [B, T, width]
    delta: Any  # [B, T, width]
    A: Any  # A log2(e) [width, N]
    B: Any  # [B, T, N]
    C: Any  # [B, T, N]
    D: Any  # [width], or None
    keep: Any  # [B, T] int32, or None
    dy: Any = None  # [B, T, width] backward


def make_inputs(sizes: Sizes, x, delta, A, B, C, D, segment_ids, dy=None) -> KernelInputs:
    return KernelInputs(
        pad_last(x, sizes.width),
        pad_last(delta, sizes.width),
        pad_state(A.astype(jnp.float32) / LN_2, sizes),
        pad_last(B, sizes.states),
        pad_last(C, sizes.states),
        None if D is None else pad_last(D.astype(jnp.float32), sizes.width),
        keep_of(segment_ids, sizes.reverse),
        None if dy is None else pad_last(dy, sizes.width),
    )


def pad_state(x: jax.Array, sizes: Sizes) -> jax.Array:
    """[..., D, N] -> [..., width, states] in float32."""
    x = pad_last(x.astype(jnp.float32), sizes.states)
    missing = sizes.width - sizes.channels
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, missing), (0, 0))) if missing else x


def pad_chunk_states(states: jax.Array, sizes: Sizes) -> jax.Array:
    """[B, G, N, D] -> [B, G, states, width] in float32."""
    states = pad_last(states.astype(jnp.float32), sizes.width)
    missing = sizes.states - states.shape[2]
    return jnp.pad(states, ((0, 0), (0, 0), (0, missing), (0, 0)))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --- A program


@dataclass(frozen=True)
class Program:
    """A program at work: its indices, and loads and stores of its channels.

    Tokens are counted in walking order."""

    sizes: Sizes
    refs: KernelInputs
    b: Any
    part: Any
    block: Any
    channels: list[gpu.Span]  # of each tile

    @staticmethod
    def of(sizes: Sizes, refs: KernelInputs) -> "Program":
        x, b = pl.program_id(0), pl.program_id(1)
        block, part = x % sizes.blocks, x // sizes.blocks
        first = block * sizes.tiles * sizes.lanes
        channels = [
            gpu.span(first + n * sizes.lanes, sizes.lanes, sizes.width, True)
            for n in range(sizes.tiles)
        ]
        return Program(sizes, refs, b, part, block, channels)

    def input_index(self, t: Any) -> Any:
        """Where token t is in an input; of a token past the end, where the last one is."""
        t = jnp.clip(t, 0, self.sizes.length - 1)
        return self.sizes.length - 1 - t if self.sizes.reverse else t

    def output_index(self, ref: Any, t: Any) -> Any:
        """Where token t is in an output [.., T padded to whole turns, X]."""
        return ref.shape[-2] - 1 - t if self.sizes.reverse else t

    def if_valid(self, t: Any, value: Any, otherwise: float) -> Any:
        """`otherwise` for a token past the end."""
        if self.sizes.length % CHUNK == 0:
            return value
        return jnp.where(t < self.sizes.length, value, otherwise)

    def load_token(self, ref: Any, t: Any) -> Tiles:
        """x_t, delta_t or dy_t, [lanes] float32; past the end zero, which leaves the state
        alone."""
        tiles = [gpu.load(ref, self.b, self.input_index(t), c) for c in self.channels]
        return [self.if_valid(t, tile.astype(jnp.float32), 0.0) for tile in tiles]

    def load_vector(self, ref: Any, t: Any) -> jax.Array:
        """B_t or C_t [1, N] float32."""
        vector = gpu.load(ref, self.b, self.input_index(t), self.sizes.all_states)
        return vector.astype(jnp.float32)[None, :]

    def keep(self, t: Any) -> jax.Array | None:
        """Whether the state before token t survives into it, [] int32."""
        if self.refs.keep is None:
            return None
        keep = gpu.load(self.refs.keep, self.b, self.input_index(t))
        return self.if_valid(t, keep, 1)

    def exponential(self, delta: jax.Array, A: jax.Array) -> jax.Array:
        """e = exp(delta A) [lanes, N]."""
        return exp2(delta[:, None] * A, self.sizes.interpret)

    def factor(self, e: jax.Array) -> jax.Array:
        """a [lanes, N]."""
        return e + e - 1 if self.sizes.negative else e

    def load_states(self, ref: Any, *index: Any) -> Tiles:
        """[lanes, N] each, of [*index, width, N]."""
        return [gpu.load(ref, *index, c, self.sizes.all_states) for c in self.channels]

    def store_states(self, ref: Any, tiles: Sequence[jax.Array], *index: Any) -> None:
        """Writes [lanes, N] each to [*index, width, N]."""
        for tile, c in zip(tiles, self.channels, strict=True):
            gpu.store(ref, tile, *index, c, self.sizes.all_states)

    def load_chunk_state(self, ref: Any, g: Any) -> Tiles:
        """The state before chunk g, [lanes, N] each, of [B, G, N, width]."""
        states = self.sizes.all_states
        return [gpu.load(ref, self.b, g, states, c).T for c in self.channels]


# --- The walk forward


class WalkInputs(NamedTuple):
    tokens: KernelInputs
    starts: Any  # [B, parts, width, N], the states that enter the parts
    gate: Any  # None, or (z,) or (z, dout), [B, T, width] each


class WalkOutputs(NamedTuple):
    # [B, T padded, width] each: (), (y,), or with a gate (z,) (out,), with (z, dout) (dz, dy).
    tokens: Any
    ends: Any  # [B, parts, width, N], the states that leave the parts
    chunk_states: Any  # [B, G, N, width], the states before the chunks; None unless asked for
    turn: Any  # [B, parts, TURN, width], memory for y of a turn; None without a gate


def forward_outputs(
    sizes: Sizes, inputs: WalkInputs, dtype: Any, keep_chunk_states: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y [B, T padded, width] in `dtype`, gated where there is a gate; the states that leave the
    parts; and if asked for those before the chunks."""
    (y,), ends, chunk_states, _ = _walk("forward", sizes, inputs, (dtype,), keep_chunk_states)
    return y, ends, chunk_states


def backward_preparation(
    sizes: Sizes, inputs: WalkInputs, keep_chunk_states: bool
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """What the walk back needs first: with a gate dz and dy [B, T padded, width], else (); and if
    asked for the states before the chunks."""
    dtypes = () if inputs.gate is None else tuple(x.dtype for x in inputs.gate)
    name = "states" if keep_chunk_states else "gate"
    outputs = _walk(name, sizes.one_tile(), inputs, dtypes, keep_chunk_states)
    return outputs.tokens, outputs.chunk_states


def _walk(
    name: str, sizes: Sizes, inputs: WalkInputs, dtypes: tuple[Any, ...], keep_chunk_states: bool
) -> WalkOutputs:
    """Passes states over the tokens of each part; dtypes: of `WalkOutputs.tokens`."""
    turns, padded = CHUNK // TURN, sizes.turns * TURN  # of a chunk; tokens of an output

    def kernel(refs: WalkInputs, out: WalkOutputs) -> None:
        program = Program.of(sizes, refs.tokens)
        b, part, (c,) = program.b, program.part, program.channels
        (A,) = program.load_states(refs.tokens.A)  # [lanes, N]
        D = None if refs.tokens.D is None or not out.tokens else gpu.load(refs.tokens.D, c)
        first, end = sizes.part_chunks(part)

        def load_turn(t: Any) -> list[tuple[jax.Array, jax.Array]]:
            """x and delta [lanes] of the tokens from t on."""
            return [
                (
                    program.load_token(refs.tokens.x, t + k)[0],
                    program.load_token(refs.tokens.delta, t + k)[0],
                )
                for k in range(TURN)
            ]

        def turn(i: Any, carry: Any) -> Any:
            h, tokens = carry
            t = i * TURN
            next_tokens = load_turn(t + TURN)
            for k, (x, delta) in enumerate(tokens):
                a = program.factor(program.exponential(delta, A))  # [lanes, N]  Eq. 2
                u = (delta * x)[:, None]  # [lanes, 1]
                h = a * reset(h, program.keep(t + k))
                h = h + u * program.load_vector(refs.tokens.B, t + k)  # [lanes, N]  Eq. 1
                if out.tokens:
                    y = (h * program.load_vector(refs.tokens.C, t + k)).sum(1)  # [lanes]  Eq. 3
                    y = y if D is None else y + D * x
                    if refs.gate is None:
                        ref = out.tokens[0]
                        gpu.store(ref, y, b, program.output_index(ref, t + k), c)
                    else:
                        gpu.store(out.turn, y, b, part, k, c)
            if refs.gate is not None:
                _apply_gate(program, refs, out, t)
            return h, next_tokens

        def chunk(g: Any, carry: Any) -> Any:
            gpu.store(out.chunk_states, carry[0].T, b, g, sizes.all_states, c)
            last_turn = jnp.minimum((g + 1) * turns, sizes.turns)
            return lax.fori_loop(g * turns, last_turn, turn, carry)

        (h,) = program.load_states(refs.starts, b, part)  # [lanes, N]
        carry = h, load_turn(first * CHUNK)
        if keep_chunk_states:
            h, _ = lax.fori_loop(first, end, chunk, carry)
        else:
            last_turn = jnp.minimum(end * turns, sizes.turns)
            h, _ = lax.fori_loop(first * turns, last_turn, turn, carry)
        program.store_states(out.ends, [h], b, part)

    batch, width, states = sizes.batch, sizes.width, sizes.states
    return gpu.call(
        f"selective_scan_{name}",
        kernel,
        sizes.grid,
        inputs,
        WalkOutputs(
            tuple(jax.ShapeDtypeStruct((batch, padded, width), dtype) for dtype in dtypes),
            float32(batch, sizes.parts, width, states),
            float32(batch, sizes.chunks, states, width) if keep_chunk_states else None,
            None if inputs.gate is None else float32(batch, sizes.parts, TURN, width),
        ),
        warps=1,
        interpret=sizes.interpret,
    )


def _apply_gate(program: Program, refs: WalkInputs, out: WalkOutputs, t: Any) -> None:
    """Writes what the gate makes of y of the turn [TURN, lanes] that begins with token t."""
    sizes, (c,) = program.sizes, program.channels
    z, *dout = (gpu.load(ref, program.b, _turn_span(sizes, t), c) for ref in refs.gate)
    z, *dout = (x.astype(jnp.float32) for x in (z, *dout))  # [TURN, lanes]
    barrier(sizes.interpret)
    y = gpu.load(out.turn, program.b, program.part, gpu.span(0, TURN, TURN, True), c)
    if not dout:
        tiles = [gating.gate(y, z)]
    else:
        dy, per_y = gating.gate_gradients(z, *dout)
        tiles = [y * per_y, dy]
    for ref, tile in zip(out.tokens, tiles, strict=True):
        gpu.store(ref, tile, program.b, _padded_turn_span(sizes, ref, t), c)
    barrier(sizes.interpret)


def _turn_span(sizes: Sizes, t: Any) -> gpu.Span:
    """The tokens of the turn that begins with token t, in an input."""
    whole = sizes.length % TURN == 0
    if not sizes.reverse:
        return gpu.span(t, TURN, sizes.length, whole)
    index = sizes.length - 1 - t - lax.iota(jnp.int32, TURN)
    return gpu.Span(index, None if whole else index >= 0)


def _padded_turn_span(sizes: Sizes, ref: Any, t: Any) -> gpu.Span:
    """The same tokens in an output."""
    size = ref.shape[-2]
    if not sizes.reverse:
        return gpu.span(t, TURN, size, True)
    return gpu.Span(size - 1 - t - lax.iota(jnp.int32, TURN), None)


# --- Parts of time


class PartInputs(NamedTuple):
    tokens: KernelInputs


class PartOutputs(NamedTuple):
    """[B, parts, width, N] each: a part maps a state S (back: a g) to factors S + increments."""

    increments: Any
    factors: Any


def part_starts(
    sizes: Sizes, inputs: KernelInputs, initial_state: jax.Array, *, back: bool
) -> jax.Array:
    """The states that enter the parts [B, parts, width, N].

    initial_state: [B, 1, width, N]. back: the gradients a_t g_t, which run from the last part of
    the walk to the first; `initial_state` is then the gradient of the final state."""
    if sizes.parts == 1:
        return initial_state
    increments, factors = _walk_parts(sizes.one_tile(), PartInputs(inputs), back)
    return gpu.part_starts(jnp.multiply, factors, increments, initial_state, back)


def states_at_parts(sizes: Sizes, chunk_states: jax.Array) -> jax.Array:
    """The states that enter the parts [B, parts, width, N], out of those before the chunks.

    A part without chunks gets any state."""
    first, _ = sizes.part_chunks(jnp.arange(sizes.parts))
    return jnp.swapaxes(jnp.take(chunk_states, first, axis=1, mode="clip"), 2, 3)


def _walk_parts(sizes: Sizes, inputs: PartInputs, back: bool) -> PartOutputs:
    """Walks over each part from zero, without outputs of tokens."""
    turns = CHUNK // TURN

    def kernel(refs: PartInputs, out: PartOutputs) -> None:
        program, tokens = Program.of(sizes, refs.tokens), refs.tokens
        (A,) = program.load_states(tokens.A)  # [lanes, N]
        first, end = sizes.part_chunks(program.part)
        begin = end * turns - 1 if back else first * turns

        def load_turn(i: Any) -> list[tuple[jax.Array, jax.Array]]:
            """x (back: dy) and delta [lanes] of the tokens of turn i."""
            ref = tokens.dy if back else tokens.x
            return [
                (
                    program.load_token(ref, i * TURN + k)[0],
                    program.load_token(tokens.delta, i * TURN + k)[0],
                )
                for k in range(TURN)
            ]

        def turn(n: Any, carry: Any) -> Any:
            h, product, loaded = carry
            i = begin - n if back else begin + n
            next_tokens = load_turn(i - 1 if back else i + 1)
            for k in reversed(range(TURN)) if back else range(TURN):
                (x, delta), t = loaded[k], i * TURN + k
                keep = program.keep(t)
                a = program.factor(program.exponential(delta, A))  # [lanes, N]  Eq. 2
                if back:
                    g = h + x[:, None] * program.load_vector(tokens.C, t)  # Eq. 4
                    h = reset(a * g, keep)
                else:
                    u = (delta * x)[:, None]  # [lanes, 1]
                    h = a * reset(h, keep) + u * program.load_vector(tokens.B, t)  # Eq. 1
                product = reset(a * product, keep)
            return h, product, next_tokens

        product = jnp.ones(A.shape, jnp.float32)
        carry = jnp.zeros(A.shape, jnp.float32), product, load_turn(begin)
        h, product, _ = lax.fori_loop(0, (end - first) * turns, turn, carry)
        program.store_states(out.increments, [h], program.b, program.part)
        program.store_states(out.factors, [product], program.b, program.part)

    shape = float32(sizes.batch, sizes.parts, sizes.width, sizes.states)
    return gpu.call(
        "selective_scan_gradient_states" if back else "selective_scan_states",
        kernel,
        sizes.grid,
        inputs,
        PartOutputs(shape, shape),
        warps=1,
        interpret=sizes.interpret,
    )
