"""Selective scan on GPU: the sizes and inputs of its kernels, and a program at work (`__init__.py`
has the equations)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...gpu import tiles as gpu
from ...gpu.channels import CHUNK, exp2, keep_of, lanes, pad_last, part_count, round_up

LN_2 = math.log(2)

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
