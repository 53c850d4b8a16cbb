"""Selective scan on TPU: chunks in order, the state of a block of channels in registers, token
after token.

    h_t = a_t h_{t-1} + B_t u_t       u = delta x       a = e or 2 e - 1, e = exp(delta A)     (1)
    y_t = sum_n h_t C_t + D x                                                                  (2)

Channels lie along lanes, as in x, and the states of a channel along sublanes: delta_t and u_t are
rows that a load repeats over sublanes, B_t and C_t are columns, repeated over lanes once per chunk
for all blocks of channels. The sums over n wait for the end of 8 tokens: stored, then read with a
stride of 8 rows, they need one addition per register.

Backward runs against the recurrence. The states at the starts of the chunks are those that the
forward rule kept (`ops/selective_scan/gating.py`), or a first kernel makes them; within a chunk the
states before each token, and e, are recomputed into fast memory. With g_t the gradient of h_t, k_t
zero where a segment starts, h_{t-1} standing for k_t h_{t-1}, and w = delta A:

    g_t = C_t dy_t + k_{t+1} a_{t+1} g_{t+1}                                                   (3)
    dw_t = g_t h_{t-1} e_t            twice that for a = 2 e - 1                               (4)
    dC_t = sum_d h_t dy_t             dB_t = sum_d g_t u_t                                     (5)
    du_t = sum_n B_t g_t              dA = sum_bt delta_t dw_t                                 (6)
    dx_t = delta_t du_t + D dy_t      ddelta_t = x_t du_t + sum_n A dw_t                       (7)
    dD = sum_bt dy_t x_t                                                                       (8)

Sums over channels run lane by lane over the blocks of a chunk, in order, and over the lanes after
the last; those over time stay in fast memory for a whole sequence; those over the batch are XLA's.
All are float32. No factor is divided by and no product of factors is formed. With a gate, out = y
silu(z), the backward kernel recomputes y for dz where it recomputes the states, and dy = silu(z)
dout exists for a chunk at a time. Every kernel makes step sizes of `delta` and its bias itself, and
the last leaves the gradients of these: a few transcendentals for a token and channel, where the
recurrence has one for each state.

With `reverse`, t - 1 stands for t + 1 and the other way round: the same programs, whose grid and
loops count from the other end (`ops/tpu/channels.py`). Tokens past T, which come first then, have a
step of zero and change nothing.

The vector unit binds, by far: about 9 operations per token, channel and state forward and 28
backward, 4096 at a time, against 2 to 4 bytes per token and channel of each input and output.
Compiled for a v6e it is busy for three quarters of the cycles forward and two thirds backward;
latencies between the groups of 8 tokens take the rest."""

import functools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...tpu import channels
from ...tpu.channels import ChannelGrid
from ...tpu.kernel import LANES, SUBLANES, Input, Output, call
from .. import gating
from . import kernels
from .kernels import BackwardRefs, ForwardRefs, Scan, StatesRefs

LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Tuning:
    """What one grid step takes; chosen by the static cycle model of the TPU compiler for v6e.

    chunk: tokens, a power of two; backward `CHUNK`, because the states before all tokens of a block
      lie in fast memory then, of which a v4 has 16 MiB.
    columns: chunk times states at most, what B and C take in fast memory.
    values: states of all channels of a block at most, what they take in registers."""

    chunk: int = 128
    columns: int = 2048
    values: int = 8192


TUNING = Tuning()
WALKS_BACKWARDS = True


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
    reverse=False,
    interpret=False,
):
    """y in x's dtype, the final state in float32, and the states at the starts of chunks
    (`ops/selective_scan/gating.py`) or None; shapes as in `api.py`."""
    keeps = with_chunk_states and gating.keeps_chunk_states(x, A)
    options = delta_softplus, eigenvalue_range, reverse, interpret
    scan = _scan(x, A, z, bias, *options, chunk=TUNING.chunk, whole=keeps)
    grid = scan.grid
    parts = grid.chunk // gating.CHUNK
    refs = ForwardRefs(
        x=grid.of_tokens(x),
        delta=grid.of_tokens(delta),
        columns=_columns(B, C, scan),
        A_log2=grid.constant(LOG2_E * _states_first(A, scan)),
        D=_row(D, grid),
        initial_state=_state(initial_state, scan),
        z=None if z is None else grid.of_tokens(z),
        bias=None if bias is None else _row(bias, grid),
        keep=None if segment_ids is None else grid.keep(segment_ids, past=1),
        y=grid.token_output(x),
        h=grid.sequence_output(scan.states),
        starts=_chunk_starts(scan, parts) if keeps else None,
        y_rows=grid.group_scratch(),
        y_terms=kernels.terms_scratch(grid),
        chunk=kernels.chunk_scratch(scan),
    )
    results = call(functools.partial(kernels.selective_forward, scan=scan), grid, refs)
    (_, length, size), states = x.shape, A.shape[1]
    number = pl.cdiv(length, gating.CHUNK)
    starts = results.starts[:, :number, :states, :size] if keeps else None
    return results.y[:, :, :size], _states_last(results.h, A), starts


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
    reverse=False,
    interpret=False,
):
    """Gradients of x, delta, A, B, C, D, z, bias (of these three None where they are) and
    initial_state; starts: those of `forward`, or None."""
    options = delta_softplus, eigenvalue_range, reverse, interpret
    scan = _scan(x, A, z, bias, *options, chunk=gating.CHUNK)
    grid, N, (batch, length, size) = scan.grid, scan.states, x.shape
    A_states = _states_first(A, scan)
    columns = _columns(B, C, scan, backward=True)
    if starts is not None:
        starts = _pad_states(starts, scan)
    elif grid.chunks == 1:
        starts = _states_first(initial_state, scan)[:, None]
    else:
        starts = _starts(x, delta, A_states, columns.array, bias, initial_state, segment_ids, scan)

    dcolumns_shape = jax.ShapeDtypeStruct(
        (batch, grid.chunks, grid.chunk * 2 * N // LANES, 1, LANES), jnp.float32
    )
    refs = BackwardRefs(
        x=grid.of_tokens(x, backward=True),
        delta=grid.of_tokens(delta, backward=True),
        dout=grid.of_tokens(dout, backward=True),
        columns=columns,
        starts=Input(starts, grid.chunk_states(N, backward=True)),
        A=grid.constant(A_states),
        A_log2=grid.constant(LOG2_E * A_states),
        D=_row(D, grid),
        dfinal_state=_state(dfinal_state, scan),
        z=None if z is None else grid.of_tokens(z, backward=True),
        bias=None if bias is None else _row(bias, grid),
        keep=None if segment_ids is None else grid.keep(segment_ids, backward=True, past=1),
        dx=grid.token_output(x, backward=True),
        ddelta=grid.token_output(delta, backward=True),
        dcolumns=Output(dcolumns_shape, grid.shared(dcolumns_shape, backward=True)),
        dA=grid.sequence_output(N),
        dD=grid.sequence_output(SUBLANES),
        ag=grid.sequence_output(N),
        dz=None if z is None else grid.token_output(z, backward=True),
        dbias=None if bias is None else grid.sequence_output(SUBLANES),
        **kernels.backward_scratch(scan),
    )
    results = call(functools.partial(kernels.selective_backward, scan=scan), grid, refs)
    dcolumns = results.dcolumns.reshape(batch, -1, 2, N)[:, :length, :, : A.shape[1]]
    return (
        results.dx[:, :, :size],
        results.ddelta[:, :, :size],
        results.dA.sum(0)[: A.shape[1], :size].T,
        dcolumns[:, :, 0],
        dcolumns[:, :, 1],
        None if D is None else results.dD.sum((0, 1))[:size],
        None if z is None else results.dz[:, :, :size],
        None if bias is None else results.dbias.sum((0, 1))[:size],
        _states_last(results.ag, A),
    )


def _starts(x, delta, A_states, columns, bias, initial_state, segment_ids, scan: Scan) -> jax.Array:
    """The states at the starts of chunks [B, chunks, N, width], computed anew."""
    grid = scan.grid
    refs = StatesRefs(
        x=grid.of_tokens(x),
        delta=grid.of_tokens(delta),
        columns=Input(columns, grid.shared(columns)),
        A_log2=grid.constant(LOG2_E * A_states),
        initial_state=_state(initial_state, scan),
        bias=None if bias is None else _row(bias, grid),
        keep=None if segment_ids is None else grid.keep(segment_ids, past=1),
        starts=_chunk_starts(scan),
        h=kernels.states_scratch(scan),
        chunk=kernels.chunk_scratch(scan),
    )
    return call(functools.partial(kernels.selective_states, scan=scan), grid, refs).starts


def _scan(
    x,
    A,
    z,
    bias,
    delta_softplus: bool,
    eigenvalue_range,
    reverse: bool,
    interpret: bool,
    *,
    chunk: int,
    whole: bool = False,
) -> Scan:
    """whole: chunks are made of whole `CHUNK`s."""
    N = SUBLANES * pl.cdiv(A.shape[1], SUBLANES)
    lanes = TUNING.values // N
    grid = channels.cut(x, _within(chunk, N), lanes, reverse=reverse, interpret=interpret)
    if whole:
        number = pl.cdiv(grid.chunk, gating.CHUNK)
        grid = replace(grid, chunk=number * gating.CHUNK)
    return Scan(
        grid,
        N,
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


def _chunk_starts(scan: Scan, count: int = 1) -> Output:
    """The states at the starts of chunks, or of `count` parts of each chunk."""
    grid, N = scan.grid, scan.states
    shape = grid.batch, grid.chunks * count, N, grid.width
    return Output(jax.ShapeDtypeStruct(shape, jnp.float32), grid.chunk_states(N, count=count))


def _columns(B, C, scan: Scan, backward: bool = False) -> Input:
    """B and C side by side [B, chunks, groups of 8, 8, columns], in float32, zero past T."""
    grid = scan.grid
    past = grid.chunks * grid.chunk - grid.length
    padding = ((0, 0), (0, past), (0, scan.states - B.shape[2]))
    parts = [jnp.pad(z.astype(jnp.float32), padding) for z in (B, C)]
    shape = grid.batch, grid.chunks, grid.groups, SUBLANES, scan.columns
    array = jnp.concatenate(parts, 2).reshape(shape)
    return Input(array, grid.shared(array, backward))


def _state(x: jax.Array, scan: Scan) -> Input:
    """A state [B, D, N] as [B, N, width]."""
    return scan.grid.of_sequences(_states_first(x, scan))


def _states_first(x: jax.Array, scan: Scan) -> jax.Array:
    """[..., D, N] -> [..., N, D] in float32, padded with zeros."""
    return _pad_states(jnp.swapaxes(x.astype(jnp.float32), -1, -2), scan)


def _pad_states(x: jax.Array, scan: Scan) -> jax.Array:
    """[..., N, D] with zeros up to what a scan has of both."""
    x, missing = scan.grid.widened(x), scan.states - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])


def _states_last(x: jax.Array, A: jax.Array) -> jax.Array:
    """Inverse of `_states_first` for A's D and N."""
    return jnp.swapaxes(x, -1, -2)[..., : A.shape[0], : A.shape[1]]


def _row(x_D: jax.Array | None, grid: ChannelGrid) -> Input:
    """[1, width], zeros for None."""
    if x_D is None:
        return grid.constant(jnp.zeros((1, grid.width), jnp.float32))
    return grid.constant(grid.widened(x_D.astype(jnp.float32)[None]))
