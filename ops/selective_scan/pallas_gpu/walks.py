"""Selective scan on GPU: the kernels that walk over time forward, or over parts of time without
writing anything of tokens (`__init__.py` has the equations).

A gate is applied to a turn of tokens at once, for which y passes through memory of the program's
own: what is elementwise on tokens and channels is then computed once, by all threads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...gpu import tiles as gpu
from ...gpu.channels import CHUNK, barrier, reset
from .. import gating
from .program import KernelInputs, Program, Sizes, float32

TURN = 8  # tokens that a program loads at once


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
    turns = CHUNK // TURN  # of a chunk
    all_turns = pl.cdiv(sizes.length, TURN)
    padded = all_turns * TURN  # tokens of an output

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
            last_turn = jnp.minimum((g + 1) * turns, all_turns)
            return lax.fori_loop(g * turns, last_turn, turn, carry)

        (h,) = program.load_states(refs.starts, b, part)  # [lanes, N]
        carry = h, load_turn(first * CHUNK)
        if keep_chunk_states:
            h, _ = lax.fori_loop(first, end, chunk, carry)
        else:
            last_turn = jnp.minimum(end * turns, all_turns)
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
    span = gpu.reversed_span if sizes.reverse else gpu.span
    return span(t, TURN, sizes.length, sizes.length % TURN == 0)


def _padded_turn_span(sizes: Sizes, ref: Any, t: Any) -> gpu.Span:
    """The same tokens in an output."""
    span = gpu.reversed_span if sizes.reverse else gpu.span
    return span(t, TURN, ref.shape[-2], True)


# --- Parts of time


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
    increments, factors = _walk_parts(sizes.one_tile(), inputs, back)
    return gpu.part_starts(jnp.multiply, factors, increments, initial_state, back)


def states_at_parts(sizes: Sizes, chunk_states: jax.Array) -> jax.Array:
    """The states that enter the parts [B, parts, width, N], out of those before the chunks.

    A part without chunks gets any state."""
    first, _ = sizes.part_chunks(jnp.arange(sizes.parts))
    return jnp.swapaxes(jnp.take(chunk_states, first, axis=1, mode="clip"), 2, 3)


def _walk_parts(sizes: Sizes, inputs: KernelInputs, back: bool) -> PartOutputs:
    """Walks over each part from zero, without outputs of tokens."""
    turns = CHUNK // TURN

    def kernel(refs: KernelInputs, out: PartOutputs) -> None:
        program = Program.of(sizes, refs)
        (A,) = program.load_states(refs.A)  # [lanes, N]
        first, end = sizes.part_chunks(program.part)
        begin = end * turns - 1 if back else first * turns

        def load_turn(i: Any) -> list[tuple[jax.Array, jax.Array]]:
            """x (back: dy) and delta [lanes] of the tokens of turn i."""
            ref = refs.dy if back else refs.x
            return [
                (
                    program.load_token(ref, i * TURN + k)[0],
                    program.load_token(refs.delta, i * TURN + k)[0],
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
                    g = h + x[:, None] * program.load_vector(refs.C, t)  # Eq. 4
                    h = reset(a * g, keep)
                else:
                    u = (delta * x)[:, None]  # [lanes, 1]
                    h = a * reset(h, keep) + u * program.load_vector(refs.B, t)  # Eq. 1
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
