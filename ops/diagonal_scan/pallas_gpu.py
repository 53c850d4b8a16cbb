"""Diagonal scan on NVIDIA GPUs: a warp walks over time with the states of 32 channels in registers.
(`ops/gpu/__init__.py` explains the words.)

    h_t = a_t h_{t-1} + b_t                                                           (1)

Backward, with dh_t the cotangent of h_t (of the last token: plus that of the final state), g_t its
gradient and h_{t-1} zero where a segment starts:

    g_t = dh_t + conj(a_{t+1}) g_{t+1}                                                (2)
    da_t = g_t conj(h_{t-1})            db_t = g_t                                    (3)
    dh_{-1} = conj(a_0) g_0                                                           (4)

where the gradient of a pair of reals is written as the complex number of its two parts. The states
h are the op's own output. A program takes turns of 16 tokens from the last to the first and loads
each when it takes it (three numbers a token; whether to load ahead, as forward does, is not
measured). Gradients of a constant factor are summed over time in registers, over parts and the
batch in plain JAX, in float32.

Memory binds: 2 operations for each number that is read or written. One thread has one channel and
takes its tokens one after another. A scan over tokens inside a block would form products of factors
of many tokens and gain nothing: what hides the latency of memory is the number of loads under way,
and a turn is loaded at once. Few channels leave too few loads; then time is cut into parts, for
which b, or backward dh, is read once more. This forms the product of the factors of a part, which
may overflow where a state that grows does not. With one part no product is formed.

Not measured: how many warps saturate the memory, and so where to cut.

A number is a tuple of one real array, or of two, real and imaginary part.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..gpu import tiles as gpu
from ..gpu.channels import CHUNK, MAX_BATCH, keep_of, pad_last, part_count, reset, round_up
from .sequence_parallel import multiply, multiply_or_zero

LANES = 32  # channels of a program, one for each thread
TURN = 16  # tokens that are loaded at once
WALKS_BACKWARDS = True  # the rules take `reverse`
SUPPORTED = f"float32 or bfloat16, and B up to {MAX_BATCH}"

Number = tuple[Any, ...]


def supports(a, b, initial_state, segment_ids, *_) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del initial_state, segment_ids
    return (
        gpu.available()
        and b[0].shape[0] <= MAX_BATCH
        and all(part.dtype in (jnp.float32, jnp.bfloat16) for part in (*a, *b))
    )


def forward(a, b, initial_state, segment_ids, *, reverse=False, interpret=False):
    """h and the final state in float32; shapes as in `api.py`, each number a tuple of its parts."""
    sizes, inputs = _inputs(a, b, segment_ids, reverse, interpret)
    starts = _part_starts(sizes, inputs, initial_state, back=False)
    h, ends = _walk(sizes, _WalkInputs(inputs, starts))
    channels = b[0].shape[2]
    return sizes.tokens_of(h, channels), tuple(x[:, -1, :channels] for x in ends)


def backward(a, h, initial_state, segment_ids, dh, dfinal_state, *, reverse=False, interpret=False):
    """Gradients of a, b and initial_state, tuples like them, in float32; h [B, T, N]: the
    states."""
    sizes, inputs = _inputs(a, dh, segment_ids, reverse, interpret)
    ends = _part_starts(sizes, inputs, dfinal_state, back=True)
    initial = _pad_state(initial_state, sizes)
    da, db, starts = _walk_back(
        sizes, _GradientInputs(inputs, _pad_channels(h, sizes), initial, ends), a
    )
    channels = h[0].shape[2]
    if sizes.constant:
        da = tuple(part.sum((0, 1))[:channels] for part in da)
    else:
        da = tuple(part.astype(jnp.float32) for part in sizes.tokens_of(da, channels))
    db = sizes.tokens_of(db, channels)
    return da, db, tuple(part[:, 0, :channels] for part in starts)


@dataclass(frozen=True)
class Sizes:
    """What is static in a call."""

    batch: int
    length: int
    width: int  # channels, padded to whole programs
    numbers: int  # arrays of a number: 1, or 2 for complex ones
    parts: int  # of time
    constant: bool  # all tokens have the same factor
    reverse: bool  # time runs from the last token to the first
    interpret: bool

    @property
    def blocks(self) -> int:
        """Programs along channels."""
        return self.width // LANES

    @property
    def turns(self) -> int:
        return pl.cdiv(self.length, TURN)

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks * self.parts, self.batch

    def shapes(self, *sizes: int, dtypes: Any = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes of an output number [B, *sizes, width], float32 unless said otherwise."""
        shape = self.batch, *sizes, self.width
        dtypes = dtypes or (jnp.float32,) * self.numbers
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)

    @property
    def padded_length(self) -> int:
        """Tokens of an output, whole turns."""
        return self.turns * TURN

    def tokens_of(self, x: Number, channels: int) -> Number:
        """[B, T, N] of an output number [B, T padded, width]."""
        tokens = slice(-self.length, None) if self.reverse else slice(self.length)
        return tuple(part[:, tokens, :channels] for part in x)


class KernelInputs(NamedTuple):
    """Numbers with padded channels, as arrays or as refs."""

    a: Number  # [width] or [B, T, width]
    x: Number  # b, or backward dh [B, T, width]
    keep: Any  # [B, T] int32, or None


def _inputs(a, x, segment_ids, reverse, interpret) -> tuple[Sizes, KernelInputs]:
    batch, length, channels = x[0].shape
    width = round_up(channels, LANES)
    sizes = Sizes(
        batch,
        length,
        width,
        numbers=len(x),
        parts=part_count(length, batch * width // LANES),
        constant=a[0].ndim == 1,
        reverse=reverse,
        interpret=interpret,
    )
    keep = keep_of(segment_ids, reverse)
    return sizes, KernelInputs(_pad_channels(a, sizes), _pad_channels(x, sizes), keep)


def _pad_channels(x: Number, sizes: Sizes) -> Number:
    return tuple(pad_last(part, sizes.width) for part in x)


def _pad_state(x: Number, sizes: Sizes) -> Number:
    """[B, N] -> [B, 1, width] in float32."""
    return tuple(pad_last(part.astype(jnp.float32), sizes.width)[:, None] for part in x)


# --- Numbers


def _conjugate(x: Number) -> Number:
    return (x[0], *(-part for part in x[1:]))


def _add(x: Number, y: Number) -> Number:
    return tuple(p + q for p, q in zip(x, y, strict=True))


def _reset(x: Number, keep: Any) -> Number:
    return tuple(reset(part, keep) for part in x)


# --- A program


class Token(NamedTuple):
    """One token of a program's channels. A token past the end leaves the state alone."""

    t: Any
    a: Number  # [LANES] float32
    x: Number  # [LANES] float32
    keep: Any  # [] int32, or None


class Program:
    """A program at work: its indices, and loads and stores of its channels.

    Tokens are counted in walking order."""

    def __init__(self, sizes: Sizes, refs: KernelInputs):
        x, self.b = pl.program_id(0), pl.program_id(1)
        block, self.part = x % sizes.blocks, x // sizes.blocks
        self.channels = gpu.span(block * LANES, LANES, sizes.width, True)
        self.sizes, self.refs = sizes, refs
        self.whole = sizes.length % TURN == 0
        self.constant_factor = self.load(refs.a) if sizes.constant else None
        # The first turn of the part, and the first after it.
        part_turns = pl.cdiv(pl.cdiv(sizes.length, CHUNK), sizes.parts) * CHUNK // TURN
        self.first = jnp.minimum(self.part * part_turns, sizes.turns)
        self.end = jnp.minimum(self.first + part_turns, sizes.turns)

    def load(self, refs: Number, *index: Any) -> Number:
        """[LANES] float32."""
        return tuple(gpu.load(ref, *index, self.channels).astype(jnp.float32) for ref in refs)

    def store(self, refs: Number, values: Number, *index: Any) -> None:
        for ref, value in zip(refs, values, strict=True):
            gpu.store(ref, value, *index, self.channels)

    def store_token(self, refs: Number, values: Number, t: Any) -> None:
        """Writes [LANES] to an output [B, T padded, width]."""
        t = self.sizes.padded_length - 1 - t if self.sizes.reverse else t
        self.store(refs, values, self.b, t)

    def input_index(self, t: Any) -> Any:
        """Where token t is in an input; of a token that does not exist, where the nearest is."""
        t = jnp.clip(t, 0, self.sizes.length - 1)
        return self.sizes.length - 1 - t if self.sizes.reverse else t

    def if_valid(self, t: Any, value: Any, otherwise: float) -> Any:
        """`otherwise` for a token past the end."""
        return value if self.whole else jnp.where(t < self.sizes.length, value, otherwise)

    def load_turn(self, refs: Number, i: Any, shift: int = 0) -> list[Number]:
        """The numbers of the tokens of turn i, or of those `shift` tokens later."""
        ts = [i * TURN + k + shift for k in range(TURN)]
        return [self.load(refs, self.b, self.input_index(t)) for t in ts]

    def load_factors(self, i: Any) -> list[Number] | None:
        """The factors of the tokens of turn i; None: a constant factor."""
        return None if self.sizes.constant else self.load_turn(self.refs.a, i)

    def token(self, i: Any, k: int, x: list[Number], a: list[Number] | None) -> Token:
        """Token k of turn i; x, a: `load_turn` and `load_factors` of the turn."""
        t = i * TURN + k
        factor = self.constant_factor if a is None else a[k]
        assert factor is not None
        keep = self.refs.keep
        if keep is not None:
            keep = self.if_valid(t, gpu.load(keep, self.b, self.input_index(t)), 1)
        return Token(
            t,
            tuple(self.if_valid(t, part, 1.0 if n == 0 else 0.0) for n, part in enumerate(factor)),
            tuple(self.if_valid(t, part, 0.0) for part in x[k]),
            keep,
        )


# --- The walk forward


class _WalkInputs(NamedTuple):
    tokens: KernelInputs
    starts: Number  # [B, parts, width], the states that enter the parts


class _WalkOutputs(NamedTuple):
    h: Number  # [B, T padded, width]
    ends: Number  # [B, parts, width], the states that leave the parts


def _walk(sizes: Sizes, inputs: _WalkInputs) -> _WalkOutputs:
    def kernel(refs: _WalkInputs, out: _WalkOutputs) -> None:
        program = Program(sizes, refs.tokens)

        def turn(i: Any, carry: Any) -> Any:
            h, x, a = carry
            following = program.load_turn(refs.tokens.x, i + 1), program.load_factors(i + 1)
            for k in range(TURN):
                token = program.token(i, k, x, a)
                h = _add(multiply(token.a, _reset(h, token.keep)), token.x)  # [LANES]  Eq. 1
                program.store_token(out.h, h, token.t)
            return h, *following

        carry = (
            program.load(refs.starts, program.b, program.part),
            program.load_turn(refs.tokens.x, program.first),
            program.load_factors(program.first),
        )
        h, *_ = lax.fori_loop(program.first, program.end, turn, carry)
        program.store(out.ends, h, program.b, program.part)

    return gpu.call(
        "diagonal_scan_forward",
        kernel,
        sizes.grid,
        inputs,
        _WalkOutputs(sizes.shapes(sizes.padded_length), sizes.shapes(sizes.parts)),
        warps=1,
        interpret=sizes.interpret,
    )


# --- Parts of time


class _PartOutputs(NamedTuple):
    """A part maps a state h (back: conj(a) g) to factors h + increments; [B, parts, width]."""

    increments: Number
    factors: Number


def _part_starts(
    sizes: Sizes, inputs: KernelInputs, initial_state: Number, *, back: bool
) -> Number:
    """The states that enter the parts [B, parts, width].

    back: the gradients conj(a_t) g_t, which run from the last part of the walk to the first;
    `initial_state` is then the gradient of the final state."""
    state = _pad_state(initial_state, sizes)
    if sizes.parts == 1:
        return state
    increments, factors = _walk_parts(sizes, inputs, back)
    return gpu.part_starts(multiply_or_zero, factors, increments, state, back)


def _walk_parts(sizes: Sizes, inputs: KernelInputs, back: bool) -> _PartOutputs:
    """Walks over each part from zero, without outputs of tokens."""

    def kernel(refs: KernelInputs, out: _PartOutputs) -> None:
        program = Program(sizes, refs)
        begin, step = (program.end - 1, -1) if back else (program.first, 1)

        def turn(n: Any, carry: Any) -> Any:
            h, product, x, a = carry
            i = begin + step * n
            following = program.load_turn(refs.x, i + step), program.load_factors(i + step)
            for k in range(TURN)[::step]:
                token = program.token(i, k, x, a)
                factor = _conjugate(token.a) if back else token.a
                if back:
                    h = _reset(multiply(factor, _add(h, token.x)), token.keep)  # Eq. 2
                else:
                    h = _add(multiply(factor, _reset(h, token.keep)), token.x)  # Eq. 1
                product = _reset(multiply(factor, product), token.keep)
            return h, product, *following

        zero = jnp.zeros((LANES,), jnp.float32)
        zeros = (zero,) * sizes.numbers
        one = zero + 1, *zeros[1:]
        x = program.load_turn(refs.x, begin)
        carry = zeros, one, x, program.load_factors(begin)
        h, product, _, _ = lax.fori_loop(0, program.end - program.first, turn, carry)
        program.store(out.increments, h, program.b, program.part)
        program.store(out.factors, product, program.b, program.part)

    return gpu.call(
        f"diagonal_scan_{'gradient' if back else 'state'}_parts",
        kernel,
        sizes.grid,
        inputs,
        _PartOutputs(sizes.shapes(sizes.parts), sizes.shapes(sizes.parts)),
        warps=1,
        interpret=sizes.interpret,
    )


# --- The walk back


class _GradientInputs(NamedTuple):
    tokens: KernelInputs
    h: Number  # [B, T, width]
    initial_state: Number  # [B, 1, width]
    ends: Number  # [B, parts, width], the gradients conj(a) g that enter the parts from their ends


class _GradientOutputs(NamedTuple):
    db: Number  # [B, T padded, width]
    da: Number  # [B, T padded, width], or [B, parts, width] of a constant factor
    starts: Number  # [B, parts, width], the gradients conj(a) g that leave the parts


def _walk_back(sizes: Sizes, inputs: _GradientInputs, a: Number) -> tuple[Number, Number, Number]:
    """da, db and the gradients that leave the parts; a: factors, in whose dtype da is written."""

    def kernel(refs: _GradientInputs, out: _GradientOutputs) -> None:
        program = Program(sizes, refs.tokens)
        initial_state = program.load(refs.initial_state, program.b, 0)

        def turn(n: Any, carry: Any) -> Any:
            ag, da_sum = carry
            i = program.end - 1 - n
            a, dh = program.load_factors(i), program.load_turn(refs.tokens.x, i)
            before = program.load_turn(refs.h, i, shift=-1)  # h_{t-1}
            before[0] = tuple(
                jnp.where(i == 0, first, other)
                for first, other in zip(initial_state, before[0], strict=True)
            )
            for k in reversed(range(TURN)):
                token = program.token(i, k, dh, a)
                g = _add(ag, token.x)  # [LANES]  Eq. 2
                da = multiply(g, _conjugate(_reset(before[k], token.keep)))  # [LANES]  Eq. 3
                program.store_token(out.db, g, token.t)
                if sizes.constant:
                    da = tuple(program.if_valid(token.t, part, 0.0) for part in da)
                    da_sum = _add(da_sum, da)
                else:
                    program.store_token(out.da, da, token.t)
                ag = _reset(multiply(_conjugate(token.a), g), token.keep)  # Eq. 2
            return ag, da_sum

        zeros = (jnp.zeros((LANES,), jnp.float32),) * sizes.numbers
        carry = program.load(refs.ends, program.b, program.part), zeros if sizes.constant else ()
        ag, da_sum = lax.fori_loop(0, program.end - program.first, turn, carry)
        program.store(out.starts, ag, program.b, program.part)  # Eq. 4
        if sizes.constant:
            program.store(out.da, da_sum, program.b, program.part)

    dtypes = [part.dtype for part in a]
    gradients = gpu.call(
        "diagonal_scan_backward",
        kernel,
        sizes.grid,
        inputs,
        _GradientOutputs(
            sizes.shapes(sizes.padded_length),
            sizes.shapes(sizes.parts)
            if sizes.constant
            else sizes.shapes(sizes.padded_length, dtypes=dtypes),
            sizes.shapes(sizes.parts),
        ),
        warps=1,
        interpret=sizes.interpret,
    )
    return gradients.da, gradients.db, gradients.starts
