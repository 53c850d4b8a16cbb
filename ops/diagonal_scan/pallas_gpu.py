"""Diagonal scan on NVIDIA GPUs: a warp walks over time with the states of 32 channels in registers.

    h_t = a_t h_{t-1} + b_t

Backward, with dh_t the cotangent of h_t (of the last token: plus that of the final state), g_t its
gradient and h_{t-1} zero where a segment starts:

    g_t = dh_t + conj(a_{t+1}) g_{t+1}        da_t = g_t conj(h_{t-1})        db_t = g_t
    dh_{-1} = conj(a_0) g_0

where the gradient of a pair of reals is written as the complex number of its two parts. The states
h are the op's own output; a program takes turns of 16 tokens from the last to the first, loading
each when it takes it (three numbers a token; whether to load ahead, as forward does, is not
measured). Gradients of a constant factor are summed over time in registers, over parts and the
batch in plain JAX, in float32.

Memory binds: 2 operations for each number that is read or written. One thread has one channel and
takes its tokens one after another; a scan over tokens inside a block would form products of factors
of many tokens and gain nothing, because what hides the way to memory is how many loads are under
way, and a turn is loaded at once. Few channels leave too few of them. Then time is cut
(`pallas_gpu_scan.py`): b, or backward dh, is read once more. The product of the factors of a part
is formed for that, which may overflow where a state that grows does not; where time is whole no
product is.

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
from ..gpu.channels import CHUNK, MAX_BATCH, keep_states, kept, pad_last, parts, round_up
from .sequence_parallel import multiply, multiply_or_zero

LANES = 32  # channels of a program, one for each thread
TURN = 16  # tokens that are loaded at once
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


@dataclass(frozen=True)
class Sizes:
    """What is static in a call. width: channels, padded to whole programs; numbers: 1, or 2 for
    complex ones; parts: of time; constant: the factor is that of all tokens."""

    batch: int
    length: int
    width: int
    numbers: int
    parts: int
    constant: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        return self.width // LANES

    @property
    def turns(self) -> int:
        return pl.cdiv(self.length, TURN)

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks * self.parts, self.batch

    def number(self, *shape: int, dtypes: Any = None) -> tuple[Any, ...]:
        """Of an output [B, ..., width]."""
        shape = self.batch, *shape, self.width
        dtypes = dtypes or (jnp.float32,) * self.numbers
        return tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)

    @property
    def states(self) -> tuple[Any, ...]:
        """Of an output [B, T padded to whole turns, width] in float32."""
        return self.number(self.turns * TURN)

    def tokens(self, like: Number) -> tuple[Any, ...]:
        """Of an output [B, T padded to whole turns, width]."""
        return self.number(self.turns * TURN, dtypes=[x.dtype for x in like])


class Inputs(NamedTuple):
    """Numbers, or refs inside: a [width] or [B, T, width]; x, which enters states, b or backward dh
    [B, T, width]; keep [B, T] or None."""

    a: Number
    x: Number
    keep: Any


def _inputs(a, x, segment_ids, interpret) -> tuple[Sizes, Inputs]:
    (batch, length, channels), constant = x[0].shape, a[0].ndim == 1
    width = round_up(channels, LANES)
    cut = parts(length, batch * width // LANES)
    sizes = Sizes(batch, length, width, len(x), cut, constant, interpret)
    return sizes, Inputs(_wide(a, sizes), _wide(x, sizes), keep_states(segment_ids))


def _wide(x: Any, sizes: Sizes) -> Any:
    return jax.tree.map(lambda part: pad_last(part, sizes.width), x)


def _state(x: Number, sizes: Sizes) -> Number:
    """[B, N] -> [B, 1, width] in float32."""
    return tuple(pad_last(part.astype(jnp.float32), sizes.width)[:, None] for part in x)


def _conjugate(x: Number) -> Number:
    return (x[0], *(-part for part in x[1:]))


def _add(x: Number, y: Number) -> Number:
    return tuple(p + q for p, q in zip(x, y, strict=True))


class Walk:
    """A program at work: its place, and numbers of its channels."""

    def __init__(self, sizes: Sizes, inputs: Inputs):
        x, self.b = pl.program_id(0), pl.program_id(1)
        block, self.part = x % sizes.blocks, x // sizes.blocks
        self.channels = gpu.span(block * LANES, LANES, sizes.width, True)
        self.sizes, self.inputs = sizes, inputs
        self.whole = sizes.length % TURN == 0
        self.a = self.read(inputs.a) if sizes.constant else None
        per_part = pl.cdiv(pl.cdiv(sizes.length, CHUNK), sizes.parts) * CHUNK // TURN
        self.first = jnp.minimum(self.part * per_part, sizes.turns)
        self.last = jnp.minimum(self.first + per_part, sizes.turns)

    def read(self, refs: Number, *index: Any) -> Number:
        return tuple(gpu.load(ref, *index, self.channels).astype(jnp.float32) for ref in refs)

    def write(self, refs: Number, values: Number, *index: Any) -> None:
        for ref, value in zip(refs, values, strict=True):
            gpu.store(ref, value, *index, self.channels)

    def valid(self, t: Any, value: Any, otherwise: float) -> Any:
        """What a token that does not exist has instead."""
        return value if self.whole else jnp.where(t < self.sizes.length, value, otherwise)

    def turn(self, refs: Number, i: Any, shift: int = 0) -> list[Number]:
        """The numbers of the tokens of a turn, or of those `shift` tokens away."""
        ts = [i * TURN + k + shift for k in range(TURN)]
        return [self.read(refs, self.b, self._token(t)) for t in ts]

    def factors(self, i: Any) -> list[Number] | None:
        """Of the tokens of a turn; None for one that is constant."""
        return None if self.a is not None else self.turn(self.inputs.a, i)

    def token(self, i: Any, k: int, x: list[Number], a: list[Number] | None) -> Any:
        """Number, factor, b (or dh) of a token, and whether it keeps the state before it."""
        t = i * TURN + k
        factor = self.a if a is None else a[k]
        assert factor is not None
        keep = self.inputs.keep
        if keep is not None:
            keep = self.valid(t, gpu.load(keep, self.b, self._token(t)), 1)
        return (
            t,
            tuple(self.valid(t, part, 1.0 if n == 0 else 0.0) for n, part in enumerate(factor)),
            tuple(self.valid(t, part, 0.0) for part in x[k]),
            keep,
        )

    def _token(self, t: Any) -> Any:
        return jnp.clip(t, 0, self.sizes.length - 1)


def _kept(x: Number, keep: Any) -> Number:
    return tuple(kept(part, keep) for part in x)


def forward(a, b, initial_state, segment_ids, *, interpret=False):
    """Shapes as in `api.py`, each number a tuple of its parts; returns h and the final state in
    float32."""
    sizes, inputs = _inputs(a, b, segment_ids, interpret)
    starts = _state(initial_state, sizes)
    if sizes.parts > 1:
        added, products = _walk(sizes, inputs)
        starts = gpu.part_starts(multiply_or_zero, products, added, starts, False)

    def kernel(inputs, starts, h, final):
        walk = Walk(sizes, inputs)

        def turn(i: Any, carry: Any) -> Any:
            h_t, b, a = carry
            following = walk.turn(inputs.x, i + 1), walk.factors(i + 1)
            for k in range(TURN):
                t, a_t, b_t, keep = walk.token(i, k, b, a)
                h_t = _add(multiply(a_t, _kept(h_t, keep)), b_t)
                walk.write(h, h_t, walk.b, t)
            return h_t, *following

        carry = (
            walk.read(starts, walk.b, walk.part),
            walk.turn(inputs.x, walk.first),
            walk.factors(walk.first),
        )
        h_t, *_ = lax.fori_loop(walk.first, walk.last, turn, carry)
        walk.write(final, h_t, walk.b, walk.part)

    h, final = gpu.call(
        "diagonal_scan_forward",
        kernel,
        sizes.grid,
        (inputs, starts),
        (sizes.states, sizes.number(sizes.parts)),
        warps=1,
        interpret=sizes.interpret,
    )
    channels = b[0].shape[2]
    return (
        tuple(x[:, : sizes.length, :channels] for x in h),
        tuple(x[:, -1, :channels] for x in final),
    )


def _walk(sizes: Sizes, inputs: Inputs, reverse: bool = False) -> tuple[Number, Number]:
    """What each part adds to a state, or reverse to the gradient conj(a_t) g_t, and the product of
    its factors."""
    of_parts = sizes.number(sizes.parts)

    def kernel(inputs, *outputs):
        walk = Walk(sizes, inputs)
        begin, step = (walk.last - 1, -1) if reverse else (walk.first, 1)

        def turn(n: Any, carry: Any) -> Any:
            h, product, x, a = carry
            i = begin + step * n
            following = walk.turn(inputs.x, i + step), walk.factors(i + step)
            for k in range(TURN)[::step]:
                _, a_t, x_t, keep = walk.token(i, k, x, a)
                if reverse:
                    a_t = _conjugate(a_t)
                    h = _kept(multiply(a_t, _add(h, x_t)), keep)
                else:
                    h = _add(multiply(a_t, _kept(h, keep)), x_t)
                product = _kept(multiply(a_t, product), keep)
            return h, product, *following

        zero = jnp.zeros((LANES,), jnp.float32)
        nothing = (zero,) * sizes.numbers
        one = zero + 1, *nothing[1:]
        carry = nothing, one, walk.turn(inputs.x, begin), walk.factors(begin)
        *results, _, _ = lax.fori_loop(0, walk.last - walk.first, turn, carry)
        for ref, result in zip(outputs, results, strict=True):
            walk.write(ref, result, walk.b, walk.part)

    return gpu.call(
        f"diagonal_scan_{'gradient' if reverse else 'state'}_parts",
        kernel,
        sizes.grid,
        (inputs,),
        (of_parts, of_parts),
        warps=1,
        interpret=sizes.interpret,
    )


def backward(a, h, initial_state, segment_ids, dh, dfinal_state, *, interpret=False):
    """Cotangents of a, b and initial_state, tuples like them, in float32; h [B, T, N] are the
    states."""
    sizes, inputs = _inputs(a, dh, segment_ids, interpret)
    ends = _state(dfinal_state, sizes)
    if sizes.parts > 1:
        added, products = _walk(sizes, inputs, reverse=True)
        ends = gpu.part_starts(multiply_or_zero, products, added, ends, True)

    def kernel(inputs, h, initial, ends, db, da, dinitial):
        walk = Walk(sizes, inputs)
        initial = walk.read(initial, walk.b, 0)

        def turn(n: Any, carry: Any) -> Any:
            ag, da_sum = carry
            i = walk.last - 1 - n
            a, dh = walk.factors(i), walk.turn(inputs.x, i)
            before = walk.turn(h, i, shift=-1)
            before[0] = tuple(
                jnp.where(i == 0, first, other)
                for first, other in zip(initial, before[0], strict=True)
            )
            for k in reversed(range(TURN)):
                t, a_t, dh_t, keep = walk.token(i, k, dh, a)
                g_t = _add(ag, dh_t)
                da_t = multiply(g_t, _conjugate(_kept(before[k], keep)))
                walk.write(db, g_t, walk.b, t)
                if sizes.constant:
                    da_t = tuple(walk.valid(t, part, 0.0) for part in da_t)
                    da_sum = _add(da_sum, da_t)
                else:
                    walk.write(da, da_t, walk.b, t)
                ag = _kept(multiply(_conjugate(a_t), g_t), keep)
            return ag, da_sum

        zeros = (jnp.zeros((LANES,), jnp.float32),) * sizes.numbers
        carry = walk.read(ends, walk.b, walk.part), zeros if sizes.constant else ()
        ag, da_sum = lax.fori_loop(0, walk.last - walk.first, turn, carry)
        walk.write(dinitial, ag, walk.b, walk.part)
        if sizes.constant:
            walk.write(da, da_sum, walk.b, walk.part)

    db, da, dinitial = gpu.call(
        "diagonal_scan_backward",
        kernel,
        sizes.grid,
        (inputs, _wide(h, sizes), _state(initial_state, sizes), ends),
        (
            sizes.states,
            sizes.number(sizes.parts) if sizes.constant else sizes.tokens(a),
            sizes.number(sizes.parts),
        ),
        warps=1,
        interpret=sizes.interpret,
    )
    channels = h[0].shape[2]

    def of_tokens(x: Number) -> Number:
        return tuple(part[:, : sizes.length, :channels].astype(jnp.float32) for part in x)

    return (
        tuple(part.sum((0, 1))[:channels] for part in da) if sizes.constant else of_tokens(da),
        of_tokens(db),
        tuple(part[:, 0, :channels] for part in dinitial),
    )
