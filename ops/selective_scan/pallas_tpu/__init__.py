"""Selective scan on TPU: chunks in order, the state of a block of channels in registers, token
after token.

    h_t = a_t h_{t-1} + B_t u_t      u = delta x      a = e or 2 e - 1, e = exp(delta A)      y_t =
    sum_n h_t C_t + D x

Channels lie along lanes, as in x, and the states of a channel along sublanes: delta_t and u_t are
rows that a load repeats over sublanes, B_t and C_t are columns, repeated over lanes once per chunk
for all blocks of channels. The sums over n wait for the end of 8 tokens: stored, then read with a
stride of 8 rows, they need one addition per register.

Backward runs from the last chunk to the first. The states at the starts of the chunks are those
that the forward rule kept (`gating.py`), or a first kernel makes them; within a chunk the states
before each token, and e, are recomputed into fast memory. With g_t the gradient of h_t, k_t zero
where a segment starts, and h_{t-1} standing for k_t h_{t-1}, from the last token to the first:

    g_t = C_t dy_t + k_{t+1} a_{t+1} g_{t+1}      dw_t = g_t h_{t-1} e_t (twice that for a = 2 e -
                                                  1), of w = delta A
    dC_t = sum_d h_t dy_t                         dB_t = sum_d g_t u_t
    du_t = sum_n B_t g_t                          dA = sum_bt delta_t dw_t
    dx_t = delta_t du_t + D dy_t                  ddelta_t = x_t du_t + sum_n A dw_t           dD =
    sum_bt dy_t x_t

Sums over channels run lane by lane over the blocks of a chunk, in order, and over the lanes after
the last; those over time stay in fast memory for a whole sequence; those over the batch are XLA's.
All are float32. No factor is divided by and no product of factors is formed. With a gate, out = y
silu(z), the backward kernel recomputes y for dz where it recomputes the states, and dy = silu(z)
dout exists for a chunk at a time. Every kernel makes step sizes of `delta` and its bias itself, and
the last leaves the gradients of these: a few transcendentals for a token and channel, where the
recurrence has one for each state.

The vector unit binds, by far: about 9 operations per token, channel and state forward and 28
backward, 4096 at a time, against 2 to 4 bytes per token and channel of each input and output.
Compiled for a v6e it is busy for three quarters of the cycles forward and two thirds backward;
latencies between the groups of 8 tokens take the rest."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...tpu.blocks import LANES
from ...tpu.channels import SUBLANES, Blocks, call, cut, keep_scalars, pad_channels
from .. import gating
from . import kernels
from .kernels import Scan

LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes; chosen by the static cycle model of the TPU compiler for v6e.

    chunk: tokens, a power of two; backward `CHUNK`, because the states before all tokens of a block
    lie in fast memory then, of which a v4 has 16 MiB. columns: chunk times states at most, what B
    and C take in fast memory. values: states of all channels of a block at most, what they take in
    registers."""

    chunk: int = 128
    columns: int = 2048
    values: int = 8192


TUNING = Tuning()


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
    options = segment_ids, delta_softplus, eigenvalue_range
    keeps = with_chunk_states and gating.keeps_chunk_states(x, A)
    scan = _scan(x, A, z, bias, *options, TUNING.chunk, whole=keeps)
    blocks, columns = scan.blocks, _columns(B, C, scan)
    state = blocks.sequence(scan.states)
    y, final_state, *starts = call(
        functools.partial(kernels.selective_forward, scan=scan, keeps=keeps),
        blocks,
        [
            (pad_channels(x), blocks.tokens()),
            (pad_channels(delta), blocks.tokens()),
            (columns, blocks.shared(columns)),
            (LOG2_E * _states_first(A, scan), blocks.constant(scan.states)),
            (_row(D, blocks), blocks.constant(1)),
            (_states_first(initial_state, scan), state),
            *_gate(z, blocks.tokens()),
            *_bias(bias, blocks),
            *_keep(segment_ids, blocks),
        ],
        [
            (_like(x, blocks), blocks.tokens()),
            (_float32(blocks.batch, scan.states, blocks.width), state),
            *([_chunk_starts(scan, blocks.chunk // gating.CHUNK)] if keeps else []),
        ],
        kernels.forward_scratch(scan),
        interpret=interpret,
    )
    (_, length, channels), states = x.shape, A.shape[1]
    number = pl.cdiv(length, gating.CHUNK)
    starts = starts[0][:, :number, :states, :channels] if keeps else None
    return y[:, :, :channels], _states_last(final_state, A), starts


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
    """Cotangents of x, delta, A, B, C, D, z, bias (of these three None where they are) and
    initial_state; starts: those of `forward`, or None."""
    options = segment_ids, delta_softplus, eigenvalue_range
    scan = _scan(x, A, z, bias, *options, gating.CHUNK)
    blocks, columns = scan.blocks, _columns(B, C, scan)
    N, (batch, length, channels) = scan.states, x.shape
    x_, delta_, dout_ = (pad_channels(array) for array in (x, delta, dout))
    A_ = _states_first(A, scan)
    state, constant = blocks.sequence(N), blocks.constant(N)
    of_sequence = _float32(batch, N, blocks.width)

    entering = _states_first(initial_state, scan)
    if starts is not None:
        starts = _pad_states(starts, scan)
    elif blocks.chunks == 1:
        starts = entering[:, None]
    else:
        (starts,) = call(
            functools.partial(kernels.selective_states, scan=scan),
            blocks,
            [
                (x_, blocks.tokens()),
                (delta_, blocks.tokens()),
                (columns, blocks.shared(columns)),
                (LOG2_E * A_, constant),
                (entering, state),
                *_bias(bias, blocks),
                *_keep(segment_ids, blocks),
            ],
            [_chunk_starts(scan)],
            kernels.states_scratch(scan),
            interpret=interpret,
        )

    tokens = blocks.tokens(reverse=True)
    sums = _float32(batch, blocks.chunks, blocks.chunk * 2 * N // LANES, 1, LANES)
    of_rows = _float32(batch, SUBLANES, blocks.width), blocks.sequence(SUBLANES)
    dx, ddelta, dcolumns, dA, dD, dinitial_state, *others = call(
        functools.partial(kernels.selective_backward, scan=scan),
        blocks,
        [
            (x_, tokens),
            (delta_, tokens),
            (dout_, tokens),
            (columns, blocks.shared(columns, reverse=True)),
            (starts, blocks.chunk_states(N, reverse=True)),
            (A_, constant),
            (LOG2_E * A_, constant),
            (_row(D, blocks), blocks.constant(1)),
            (_states_first(dfinal_state, scan), state),
            *_gate(z, tokens),
            *_bias(bias, blocks),
            *_keep(segment_ids, blocks, reverse=True),
        ],
        [
            (_like(x, blocks), tokens),
            (_like(delta, blocks), tokens),
            (sums, blocks.shared(sums, reverse=True)),
            (of_sequence, state),
            of_rows,
            (of_sequence, state),
            *([] if z is None else [(_like(z, blocks), tokens)]),
            *([] if bias is None else [of_rows]),
        ],
        kernels.backward_scratch(scan),
        interpret=interpret,
    )
    others = iter(others)
    dz = None if z is None else next(others)[:, :, :channels]
    dbias = None if bias is None else next(others).sum((0, 1))[:channels]
    dcolumns = dcolumns.reshape(batch, -1, 2, N)[:, :length, :, : A.shape[1]]
    return (
        dx[:, :, :channels],
        ddelta[:, :, :channels],
        dA.sum(0)[: A.shape[1], :channels].T,
        dcolumns[:, :, 0],
        dcolumns[:, :, 1],
        None if D is None else dD.sum((0, 1))[:channels],
        dz,
        dbias,
        _states_last(dinitial_state, A),
    )


def _scan(
    x, A, z, bias, segment_ids, delta_softplus, eigenvalue_range, chunk: int, whole: bool = False
) -> Scan:
    """whole: chunks are made of whole `CHUNK`s."""
    N = SUBLANES * pl.cdiv(A.shape[1], SUBLANES)
    blocks = cut(x, _within(chunk, N), TUNING.values // N)
    if whole:
        number = pl.cdiv(blocks.chunk, gating.CHUNK)
        blocks = replace(blocks, chunk=number * gating.CHUNK)
    return Scan(
        blocks,
        N,
        segments=segment_ids is not None,
        negative=eigenvalue_range == (-1, 1),
        gate=z is not None,
        bias=bias is not None,
        softplus=delta_softplus,
    )


def backward_chunk(states: int) -> int:
    """Tokens of a chunk, backward, of this many states of a channel."""
    return _within(gating.CHUNK, SUBLANES * pl.cdiv(states, SUBLANES))


def _within(chunk: int, states: int) -> int:
    """The chunk, or as much of it as `TUNING.columns` leaves."""
    return min(chunk, max(16, 1 << (TUNING.columns // states).bit_length() - 1))


def _bias(bias: jax.Array | None, blocks: Blocks) -> list[Any]:
    return [] if bias is None else [(_row(bias, blocks), blocks.constant(1))]


def _keep(segment_ids: jax.Array | None, blocks: Blocks, reverse: bool = False) -> list[Any]:
    if segment_ids is None:
        return []
    return [keep_scalars(segment_ids, blocks, reverse, past=1)]


def _chunk_starts(scan: Scan, count: int = 1) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """The states at the starts of chunks, or of `count` parts of each chunk."""
    blocks, N = scan.blocks, scan.states
    states = _float32(blocks.batch, blocks.chunks * count, N, blocks.width)
    return states, blocks.chunk_states(N, count=count)


def _gate(z: jax.Array | None, tokens: pl.BlockSpec) -> list[Any]:
    return [] if z is None else [(pad_channels(z), tokens)]


def _columns(B, C, scan: Scan) -> jax.Array:
    """B and C side by side [B, chunks, groups of 8, 8, columns], in float32, zero past T."""
    blocks = scan.blocks
    past = blocks.chunks * blocks.chunk - blocks.length
    gate = ((0, 0), (0, past), (0, scan.states - B.shape[2]))
    parts = [jnp.pad(z.astype(jnp.float32), gate) for z in (B, C)]
    groups = blocks.chunk // SUBLANES
    shape = blocks.batch, blocks.chunks, groups, SUBLANES, scan.columns
    return jnp.concatenate(parts, 2).reshape(shape)


def _states_first(x: jax.Array, scan: Scan) -> jax.Array:
    """[..., D, N] -> [..., N, D] in float32, padded with zeros."""
    return _pad_states(jnp.swapaxes(x.astype(jnp.float32), -1, -2), scan)


def _pad_states(x: jax.Array, scan: Scan) -> jax.Array:
    """[..., N, D] with zeros up to what a scan has of both."""
    x, missing = pad_channels(x), scan.states - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])


def _states_last(x: jax.Array, A: jax.Array) -> jax.Array:
    """Inverse of `_states_first` for A's D and N."""
    return jnp.swapaxes(x, -1, -2)[..., : A.shape[0], : A.shape[1]]


def _row(x_D: jax.Array | None, blocks: Blocks) -> jax.Array:
    """[1, width], zeros for None."""
    if x_D is None:
        return jnp.zeros((1, blocks.width), jnp.float32)
    return pad_channels(x_D.astype(jnp.float32)[None])


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: jax.Array, blocks: Blocks) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:2], blocks.width), x.dtype)
