"""Dense scan in plain JAX on every backend: a convolution where the caller has its kernel, else the
recurrence in chunks of C tokens.

    y_t = sum_{s <= t} kernel_{t-s} u_s + C A^(t+1) x        x <- A^C x + sum_s A^(C-1-s) B u_s
    t, s = 0 .. C - 1

A sequence takes T / C steps, not T. The work per token is C inside a chunk, N for each of writing
and reading the state, and N^2 / C to advance it. JAX differentiates this; the backward pass
recomputes a chunk from the state before it, which is all that is kept.

Letters: D systems, N state, M outputs per system, C chunk length, G number of chunks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..framework import segments
from ..long_convolution.api import long_convolution
from .powers import einsum, krylov, matrix_power

CHUNK = 32  # tokens


def forward(
    u: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    kernel: Callable[[int], jax.Array] | None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the final state [B, D, N]; shapes as in `api.py`, float32.

    kernel: of a call without state and segments alone."""
    if reverse:
        flipped = None if segment_ids is None else segment_ids[:, ::-1]
        y_BTDM, state = forward(u[:, ::-1], A, B, C, initial_state, flipped, kernel)
        return y_BTDM[:, ::-1], state
    if kernel is not None:
        return convolution(u, A, B, kernel(u.shape[1]))
    return scan_chunks(u, A, B, C, initial_state, segment_ids)


def convolution(
    u_BTD: jax.Array, A_DNN: jax.Array, B_DN: jax.Array, kernel_DMT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the final state [B, D, N], from a zero state."""
    outputs = kernel_DMT.shape[1]
    y_BTX = long_convolution(
        jnp.repeat(u_BTD, outputs, axis=2), kernel_DMT.reshape(-1, kernel_DMT.shape[2])
    )
    return y_BTX.reshape(*u_BTD.shape, -1), final_state(u_BTD, A_DNN, B_DN)


def final_state(u_BTD: jax.Array, A_DNN: jax.Array, B_DN: jax.Array) -> jax.Array:
    """The state [B, D, N] after u, from zero: what the output of a convolution does not say."""
    batch, length, channels = u_BTD.shape
    chunk = min(CHUNK, length)
    # Zeros in front of the first token leave the zero state alone.
    u_BTD = jnp.pad(u_BTD, ((0, 0), (-length % chunk, 0), (0, 0)))
    u_GBCD = jnp.moveaxis(u_BTD.reshape(batch, -1, chunk, channels), 1, 0)
    write_DCN = krylov(A_DNN, B_DN[:, None], chunk)[:, ::-1, 0]
    step_DNN = matrix_power(A_DNN, chunk)

    def advance(x_BDN: jax.Array, u_BCD: jax.Array) -> tuple[jax.Array, None]:
        x_BDN = einsum("dnk,bdk->bdn", step_DNN, x_BDN)
        return x_BDN + einsum("dcn,bcd->bdn", write_DCN, u_BCD), None

    zeros_BDN = jnp.zeros((batch, channels, B_DN.shape[-1]), jnp.float32)
    return lax.scan(advance, zeros_BDN, u_GBCD)[0]


class ChunkMatrices(NamedTuple):
    """What all chunks have in common."""

    write_DCN: jax.Array  # A^t B
    read_DCMN: jax.Array  # C A^(t+1)
    toeplitz_DMCC: jax.Array  # C A^(t-s) B for s <= t, else 0


def chunk_matrices(
    A_DNN: jax.Array, B_DN: jax.Array, C_DMN: jax.Array, chunk: int
) -> ChunkMatrices:
    """`ChunkMatrices` of chunks of so many tokens."""
    write_DCN = krylov(A_DNN, B_DN[:, None], chunk)[:, :, 0]
    kernel_DMC = einsum("dmn,dcn->dmc", C_DMN, write_DCN)
    lag_CC = jnp.arange(chunk)[:, None] - jnp.arange(chunk)[None, :]
    toeplitz_DMCC = jnp.where((lag_CC >= 0)[None, None], kernel_DMC[:, :, jnp.abs(lag_CC)], 0.0)
    return ChunkMatrices(write_DCN, read_rows(A_DNN, C_DMN, chunk), toeplitz_DMCC)


def read_rows(A_DNN: jax.Array, C_DMN: jax.Array, chunk: int) -> jax.Array:
    """C A^(t+1), t = 0 .. chunk - 1: [D, C, M, N], what token t reads of the state before."""
    first_DMN = einsum("dmn,dnk->dmk", C_DMN, A_DNN)
    return krylov(jnp.swapaxes(A_DNN, 1, 2), first_DMN, chunk)


def scan_chunks(
    u_BTD: jax.Array,
    A_DNN: jax.Array,
    B_DN: jax.Array,
    C_DMN: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the final state [B, D, N], by the recurrence in chunks."""
    batch, length, channels = u_BTD.shape
    chunk = min(CHUNK, length)
    matrices = chunk_matrices(A_DNN, B_DN, C_DMN, chunk)
    segment_BT = segments.numbers(segment_ids)  # the initial state belongs to segment 0
    x_BDN = initial_state
    if x_BDN is None:
        x_BDN = jnp.zeros((batch, channels, B_DN.shape[-1]), jnp.float32)
    carry = (x_BDN, jnp.zeros((batch,), jnp.int32))
    advance = jax.checkpoint(functools.partial(_advance, matrices))

    whole = length // chunk * chunk
    chunks = jax.tree.map(
        lambda array: jnp.moveaxis(
            array[:, :whole].reshape(batch, -1, chunk, *array.shape[2:]), 1, 0
        ),
        (u_BTD, segment_BT),
    )
    carry, y_GBCDM = lax.scan(functools.partial(advance, matrix_power(A_DNN, chunk)), carry, chunks)
    y_BTDM = jnp.moveaxis(y_GBCDM, 0, 1).reshape(batch, whole, *y_GBCDM.shape[3:])
    if whole < length:
        rest = jax.tree.map(lambda array: array[:, whole:], (u_BTD, segment_BT))
        carry, y_BCDM = advance(matrix_power(A_DNN, length - whole), carry, rest)
        y_BTDM = jnp.concatenate([y_BTDM, y_BCDM], axis=1)
    return y_BTDM, carry[0]


def _advance(matrices: ChunkMatrices, power_DNN: jax.Array, carry: Any, tokens: Any) -> Any:
    """The carry (state, number of its segment) after at most a chunk of tokens, and their y.

    power_DNN: A to the number of tokens."""
    (x_BDN, segment_B), (u_BCD, segment_BC) = carry, tokens
    size = u_BCD.shape[1]
    toeplitz_DMCC = matrices.toeplitz_DMCC[:, :, :size, :size]
    read_DCMN = matrices.read_DCMN[:, :size]
    write_DCN = matrices.write_DCN[:, :size][:, ::-1]
    from_before_BCDM = einsum("dcmn,bdn->bcdm", read_DCMN, x_BDN)
    x_BDN = einsum("dnk,bdk->bdn", power_DNN, x_BDN)
    if segment_BC is None:
        y_BCDM = einsum("dmts,bsd->btdm", toeplitz_DMCC, u_BCD)
        x_BDN = x_BDN + einsum("dcn,bcd->bdn", write_DCN, u_BCD)
        return (x_BDN, segment_B), y_BCDM + from_before_BCDM

    # The same, between tokens of one segment.
    same_BCC = (segment_BC[:, :, None] == segment_BC[:, None, :]).astype(jnp.float32)
    y_BCDM = einsum("dmts,bts,bsd->btdm", toeplitz_DMCC, same_BCC, u_BCD)
    goes_on_BC = (segment_BC == segment_B[:, None])[..., None, None]
    last_B = segment_BC[:, -1]
    written_BCD = jnp.where((segment_BC == last_B[:, None])[..., None], u_BCD, 0.0)
    x_BDN = jnp.where((last_B == segment_B)[:, None, None], x_BDN, 0.0)
    x_BDN = x_BDN + einsum("dcn,bcd->bdn", write_DCN, written_BCD)
    return (x_BDN, last_B), y_BCDM + jnp.where(goes_on_BC, from_before_BCDM, 0.0)


def free_response(x_BDN: jax.Array, A_DNN: jax.Array, C_DMN: jax.Array, length: int) -> jax.Array:
    """C A^(t+1) x, t = 0 .. length - 1: [B, length, D, M].

    This is what the state before the first token adds to y."""
    chunk = min(CHUNK, length)
    read_DCMN = read_rows(A_DNN, C_DMN, chunk)
    step_DNN = matrix_power(A_DNN, chunk)

    def advance(x_BDN: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return einsum("dnk,bdk->bdn", step_DNN, x_BDN), x_BDN

    _, x_GBDN = lax.scan(advance, x_BDN, length=-(-length // chunk))
    y_BGCDM = einsum("dcmn,gbdn->bgcdm", read_DCMN, x_GBDN)
    return y_BGCDM.reshape(x_BDN.shape[0], -1, *y_BGCDM.shape[3:])[:, :length]
