"""Selective scan on GPU: the walk back, which computes the gradients (`__init__.py` has the
equations)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...gpu import tiles as gpu
from ...gpu.channels import CHUNK, barrier, reset, round_up
from .program import LN_2, KernelInputs, Program, Sizes, Tiles, float32

TURN = 4  # tokens whose states are in registers at once
TILES = 2  # tiles of channels of a program


class GradientInputs(NamedTuple):
    tokens: KernelInputs
    chunk_states: Any  # [B, G, N, width], the states before the chunks
    ends: Any  # [B, parts, width, N], the gradients a g that enter the parts from their ends


class GradientOutputs(NamedTuple):
    dx: Any  # [B, T padded, width]
    ddelta: Any  # [B, T padded, width]
    dB: Any  # [B, blocks, T padded, N], summed over the channels of a program
    dC: Any  # [B, blocks, T padded, N]
    dA: Any  # [B, parts, width, N]
    starts: Any  # [B, parts, width, N], the gradients a g that leave the parts at their starts
    turn_starts: Any  # [B, parts, turns, width, N], memory for the states before a chunk's turns
    dD: Any  # [B, parts, width], or None


class _Carry(NamedTuple):
    """For each tile of channels."""

    ag: Tiles  # a_{t+1} g_{t+1} [lanes, N], zero where t + 1 starts a segment
    dA: Tiles  # [lanes, N]
    dD: Tiles  # [lanes]; empty without D


def walk_back(sizes: Sizes, inputs: GradientInputs) -> GradientOutputs:
    """The gradients of all inputs but z; channels and tokens are padded."""
    turns = CHUNK // TURN  # of a chunk

    def kernel(refs: GradientInputs, out: GradientOutputs) -> None:
        program = Program.of(sizes, refs.tokens)
        b, part = program.b, program.part
        A = program.load_states(refs.tokens.A)  # [lanes, N] each
        D = None if out.dD is None else [gpu.load(refs.tokens.D, c) for c in program.channels]
        first, end = sizes.part_chunks(part)

        def chunk(n: Any, carry: _Carry) -> _Carry:
            g = end - 1 - n
            # Of the last chunk, fewer turns.
            count = jnp.minimum(turns, pl.cdiv(sizes.length, TURN) - g * turns)

            def forward(i: Any, carry: Any) -> Any:
                return _store_turn_start(program, out, A, g * turns, i, carry)

            def back(i: Any, carry: _Carry) -> _Carry:
                return _turn_back(program, out, A, D, g * turns, count - 1 - i, carry)

            # NOTE: written and read again. Carried on from `load_chunk_state`, an exchange between
            # threads, the states would spill.
            program.store_states(
                out.turn_starts, program.load_chunk_state(refs.chunk_states, g), b, part, 0
            )
            barrier(sizes.interpret)
            h = program.load_states(out.turn_starts, b, part, 0)
            lax.fori_loop(0, count, forward, (h, _load_steps(program, g * turns)))
            barrier(sizes.interpret)
            carry = lax.fori_loop(0, count, back, carry)
            barrier(sizes.interpret)
            return carry

        zeros = [jnp.zeros(tile.shape, jnp.float32) for tile in A]
        dD = [] if D is None else [jnp.zeros((sizes.lanes,), jnp.float32) for _ in A]
        carry = _Carry(program.load_states(refs.ends, b, part), zeros, dD)
        carry = lax.fori_loop(0, end - first, chunk, carry)
        program.store_states(out.starts, carry.ag, b, part)
        program.store_states(out.dA, carry.dA, b, part)
        if out.dD is not None:
            for tile, c in zip(carry.dD, program.channels, strict=True):
                gpu.store(out.dD, tile, b, part, c)

    return gpu.call(
        "selective_scan_backward",
        kernel,
        sizes.grid,
        inputs,
        _output_shapes(sizes, inputs.tokens),
        warps=max(1, sizes.states // 16),
        interpret=sizes.interpret,
    )


def _load_steps(program: Program, i: Any) -> list[tuple[Tiles, Tiles]]:
    """x and delta of the tokens of turn i."""
    x, delta = program.refs.x, program.refs.delta
    return [
        (program.load_token(x, i * TURN + k), program.load_token(delta, i * TURN + k))
        for k in range(TURN)
    ]


def _advance(
    program: Program, A: Tiles, h: Tiles, x: Tiles, delta: Tiles, t: Any
) -> tuple[Tiles, Tiles]:
    """The state before token t, zero where the token starts a segment, and the one after it,
    [lanes, N] each."""
    keep, B = program.keep(t), program.load_vector(program.refs.B, t)
    a = [program.factor(program.exponential(*tile)) for tile in zip(delta, A, strict=True)]
    before = [reset(tile, keep) for tile in h]
    after = [
        a[r] * before[r] + (delta[r] * x[r])[:, None] * B  # Eq. 1
        for r in range(len(A))
    ]
    return before, after


def _store_turn_start(
    program: Program, out: GradientOutputs, A: Tiles, first: Any, i: Any, carry: Any
) -> Any:
    """The carry after one turn of a chunk, forward; writes the state before the turn.

    carry: the state, and x and delta of the turn's tokens; first: the chunk's first turn."""
    h, steps = carry
    program.store_states(out.turn_starts, h, program.b, program.part, i)
    i += first
    next_steps = _load_steps(program, i + 1)
    for k, (x, delta) in enumerate(steps):
        _, h = _advance(program, A, h, x, delta, i * TURN + k)
    return h, next_steps


def _turn_back(
    program: Program,
    out: GradientOutputs,
    A: Tiles,
    D: Tiles | None,
    first: Any,
    i: Any,
    carry: _Carry,
) -> _Carry:
    """The carry after one turn of a chunk, back; writes the gradients of the turn's tokens.

    first: the chunk's first turn."""
    sizes, refs, b, block = program.sizes, program.refs, program.b, program.block
    ag, dA, dD = (list(tiles) for tiles in carry)

    def load(t: Any) -> list[Tiles]:
        return [program.load_token(ref, t) for ref in (refs.x, refs.delta, refs.dy)]

    h = program.load_states(out.turn_starts, b, program.part, i)
    i += first
    states = []  # before each token
    for k in range(TURN):
        t = i * TURN + k
        x, delta, dy = load(t)
        before, h = _advance(program, A, h, x, delta, t)
        dC = _sum_channels([h[r] * dy[r][:, None] for r in range(len(A))])  # [N]  Eq. 6
        gpu.store(out.dC, dC, b, block, program.output_index(out.dC, t), sizes.all_states)
        states.append(before)
    for k in reversed(range(TURN)):
        t = i * TURN + k
        keep = program.keep(t)
        B, C = (program.load_vector(ref, t) for ref in (refs.B, refs.C))  # [1, N]
        # NOTE: loaded, and e computed, a second time, because the registers hold states.
        x, delta, dy = load(t)
        dB = []
        for r, c in enumerate(program.channels):
            g = ag[r] + C * dy[r][:, None]  # [lanes, N]  Eq. 4
            eg = program.exponential(delta[r], A[r]) * g
            eg = eg + eg if sizes.negative else eg
            dw = eg * states[k][r]  # [lanes, N]  Eq. 5
            ag[r] = reset(eg - g if sizes.negative else eg, keep)
            dA[r] += delta[r][:, None] * dw  # Eq. 9
            dB.append((delta[r] * x[r])[:, None] * g)  # [lanes, N]  Eq. 7
            du = (B * g).sum(1)  # [lanes]  Eq. 8
            dx = delta[r] * du  # [lanes]  Eq. 10
            if D is not None:
                dx += D[r] * dy[r]
                dD[r] += dy[r] * x[r]  # Eq. 12
            ddelta = x[r] * du + (A[r] * dw).sum(1) * LN_2  # [lanes]  Eq. 11
            gpu.store(out.dx, dx, b, program.output_index(out.dx, t), c)
            gpu.store(out.ddelta, ddelta, b, program.output_index(out.ddelta, t), c)
        index = program.output_index(out.dB, t)
        gpu.store(out.dB, _sum_channels(dB), b, block, index, sizes.all_states)
    return _Carry(ag, dA, dD)


def _sum_channels(tiles: Sequence[jax.Array]) -> jax.Array:
    """[N], the sum over the channels of all tiles [lanes, N]; over tiles first, because the same
    element of each is in one thread."""
    total, *rest = tiles
    for tile in rest:
        total = total + tile
    return total.sum(0)


def _output_shapes(sizes: Sizes, tokens: KernelInputs) -> GradientOutputs:
    batch, width, states = sizes.batch, sizes.width, sizes.states
    length, turns = round_up(sizes.length, TURN), CHUNK // TURN
    vectors = float32(batch, sizes.blocks, length, states)
    part_states = float32(batch, sizes.parts, width, states)
    return GradientOutputs(
        jax.ShapeDtypeStruct((batch, length, width), tokens.x.dtype),
        jax.ShapeDtypeStruct((batch, length, width), tokens.delta.dtype),
        dB=vectors,
        dC=vectors,
        dA=part_states,
        starts=part_states,
        turn_starts=float32(batch, sizes.parts, turns, width, states),
        dD=None if tokens.D is None else float32(batch, sizes.parts, width),
    )
