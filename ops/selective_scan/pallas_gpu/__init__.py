"""Selective scan on NVIDIA GPUs: a program walks over time with the states of its channels in
registers.

    h_t = a_t h_{t-1} + B_t u_t      u = delta x      a = e or 2 e - 1, e = exp(delta A)      y_t =
    sum_n h_t C_t + D x

A program is a warp with a tile of 16 channels (8, where 16 give too few programs or N > 32) by N
states. The lowering puts four consecutive states of a channel into a thread, so that loads of A and
of states are whole, a token's B_t and C_t are one short vector each, and the sum over n is a few
additions and, for N = 16, two exchanges between threads.

One token follows another. A scan over tokens inside a block, as in the authors' CUDA kernel, fills
the chip where channels are few, at two to three times the multiplications and with a transposition
of x, whose channels lie together in memory; here fewer channels per program and then parts of time
(`pallas_gpu_scan.py`) do that. Exponentials bind forward: one for each token, channel and state, 16
in a clock of a multiprocessor, which at N = 16 is one token of one channel, for which memory has 20
bytes then and needs 6 to 12.

Backward, with g_t the gradient of h_t, k_t zero where a segment starts, and h_{t-1} standing for
k_t h_{t-1}:

    g_t = C_t dy_t + k_{t+1} a_{t+1} g_{t+1}      dw_t = g_t h_{t-1} e_t (twice that for a = 2 e -
                                                  1), of w = delta A
    dC_t = sum_d h_t dy_t                         dB_t = sum_d g_t u_t
    du_t = sum_n B_t g_t                          dA = sum_bt delta_t dw_t
    dx_t = delta_t du_t + D dy_t                  ddelta_t = x_t du_t + sum_n A dw_t           dD =
    sum_bt dy_t x_t

The states at the starts of chunks of 64 tokens are those that the forward rule kept (`gating.py`),
or a first kernel makes them. A program takes chunk after chunk from the last to the first: it walks
through one, leaving the state before every fourth token in memory of its own (of which the
second-level cache holds that of all running programs), and goes back over it four tokens at a time,
the states before each in registers. It takes three exponentials for each token and state (a first
kernel one more), and is bound nevertheless by its 25 or so other instructions.

With a gate, out = y silu(z), there is a first kernel in any case: it has the registers to spare for
y, which it recomputes, for dz, and writes dy = silu(z) dout for the second.

dB and dC are sums over channels. A program has two tiles, 32 channels, adds up those of a thread
first and leaves float32 sums of its channels in memory, [B, D / 32, T, N] each, which plain JAX
adds up: no atomics, so that results are deterministic, and at N = 16 4 bytes for each token and
channel, less than the inputs have.

Not measured: all times, and from how many programs on a GPU is filled.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...gpu import tiles as gpu
from ...gpu.channels import CHUNK, LANES, MAX_BATCH, barrier, kept, lanes, pad_last, round_up
from .. import gating
from . import walks
from .walks import LN_2, Walk, float32

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


def _sum_channels(tiles: Sequence[jax.Array]) -> jax.Array:
    """[N], over the tiles first, which are in one thread."""
    total, *rest = tiles
    for tile in rest:
        total = total + tile
    return total.sum(0)


def forward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    *,
    delta_softplus,
    eigenvalue_range,
    with_chunk_states=False,
    interpret=False,
):
    """y in x's dtype, the final state in float32, and the states at the starts of chunks
    (`gating.py`) or None; shapes as in `api.py`."""
    delta = gating.step_sizes(delta, bias, delta_softplus)
    (batch, length, channels), states = x.shape, A.shape[1]
    row = lanes(batch, channels, states)
    sizes = walks.make_sizes(x, A, eigenvalue_range, 1, row, interpret)
    inputs = walks.make_inputs(sizes, x, delta, A, B, C, D, segment_ids)
    entering = walks.padded(initial_state, sizes)[:, None]
    of_parts = walks.part_starts(sizes, inputs, entering, reverse=False)
    z = None if z is None else pad_last(z, sizes.width)
    keeps = with_chunk_states and gating.keeps_chunk_states(x, A)
    y, final, starts = walks.along(sizes, inputs, of_parts, z, x.dtype, keeps)
    starts = None if starts is None else starts[:, :, :states, :channels]
    return y[:, :length, :channels], final[:, -1, :channels, :states], starts


def backward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial_state,
    segment_ids,
    starts,
    dout,
    dfinal_state,
    *,
    delta_softplus,
    eigenvalue_range,
    interpret=False,
):
    """Gradients of x, delta, A, B, C, D, z, bias (of these three None where they are) and
    initial_state; starts: what `forward` left, or None."""
    delta, pull_delta = gating.step_sizes_vjp(delta, bias, delta_softplus)
    (batch, length, channels), states = x.shape, A.shape[1]
    sizes = walks.make_sizes(x, A, eigenvalue_range, ROWS, LANES, interpret)
    inputs = walks.make_inputs(sizes, x, delta, A, B, C, D, segment_ids, dout)
    if starts is None and sizes.chunks == 1:
        starts = jnp.swapaxes(initial_state, 1, 2)[:, None]
    if starts is not None:
        starts = walks.padded_starts(starts, sizes)
        of_parts = walks.at_parts(sizes, starts)
    else:
        entering = walks.padded(initial_state, sizes)[:, None]
        of_parts = walks.part_starts(sizes, inputs, entering, reverse=False)
    dz = None
    if z is not None or starts is None:
        z = None if z is None else pad_last(z, sizes.width)
        of_gate, made = walks.before(sizes, inputs, of_parts, z, starts is None)
        starts = made if starts is None else starts
        if z is not None:
            dz, dy = of_gate
            dz, inputs = dz[:, :length, :channels], inputs._replace(dy=dy)
    leaving = walks.padded(dfinal_state, sizes)[:, None]
    ends = walks.part_starts(sizes, inputs, leaving, reverse=True)
    turns = CHUNK // BACKWARD_TURN
    padded = round_up(length, BACKWARD_TURN)

    def kernel(inputs, starts, ends, *outputs):
        dx, ddelta, dB, dC, dA, dinitial, steps, *dD = outputs
        b, part, block, channels = sizes.place()
        walk = Walk(sizes, inputs, b, channels)
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

            # Written and read again: carried on from the exchange between threads, the states would
            # spill.
            walk.write(steps, walk.start(starts, g), b, part, 0)
            barrier(sizes.interpret)
            h = walk.tiles(steps, b, part, 0)
            lax.fori_loop(0, here, skip, (h, ahead(g * turns)))
            barrier(sizes.interpret)
            carry = lax.fori_loop(0, here, lambda i, carry: retreat(g, here - 1 - i, carry), carry)
            barrier(sizes.interpret)
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
    sums = float32(batch, sizes.blocks, padded, sizes.states)
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
            *(float32(*of_parts, *state),) * 2,
            float32(*of_parts, turns, *state),
            *([] if D is None else [float32(*of_parts, sizes.width)]),
        ),
        warps=max(1, sizes.states // 16),
        interpret=interpret,
    )
    dB, dC = (z.sum(1)[:, :length, :states] for z in (dB, dC))
    ddelta, dbias = pull_delta(ddelta[:, :length, :channels])
    return (
        dx[:, :length, :channels],
        ddelta,
        dA.sum((0, 1))[:channels, :states],
        dB,
        dC,
        dD[0].sum((0, 1))[:channels] if dD else None,
        dz,
        dbias,
        dinitial[:, 0, :channels, :states],
    )
