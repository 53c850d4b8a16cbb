"""Linear time-invariant systems with a dense state matrix, many at once: kernels, and recurrences
that keep a state.

    x_t = A x_{t-1} + b u_t        y_t = c x_t        kernel_l = c A^l b

for D independent systems with one input and M outputs each; A, b, c are those of the discretised
system. Everything is products with powers of A: Krylov vectors A^l b are doubled, [X, A^L X] with
A^L squared on the way, O(log L) dense products; a kernel of length T takes about sqrt(T) of them
and as many rows c A^(C j), and the recurrence is advanced by chunks of C tokens

    y_t = sum_{s <= t} kernel_{t-s} u_s + c A^(t+1) x        x <- A^C x + sum_s A^(C-1-s) b u_s
    t, s = 0 .. C - 1

so that a sequence takes T / C steps, not T. Powers must stay bounded, in float32: the models here
have state matrices whose discretisation is a contraction. Where a mesh cuts time, each device runs
its part from zero, states pass from part to part, and the response to the state that came in is
added.

Letters: D systems (channels), N state, M outputs per system, R vectors, C chunk length, G number of
chunks."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ..framework.sharding import parts_as_batch, time_parts
from ..framework.time_parts import documents, to_parts, to_whole
from ..long_convolution.api import long_convolution
from ..state_passing.parts import states_before

# Work per token: C inside a chunk, N for each of reading and writing the state, N^2 / C to advance
# it.
CHUNK = 32

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def diagonal_powers(factor_DM: jax.Array, length: int) -> jax.Array:
    """factor^l, l = 0 .. length - 1: [D, M, length] in the dtype of `factor_DM`, by doubling.

    Products alone, as in the recurrence; exp(l log factor) would lose the digits of the phase for
    large l."""
    powers, factor = jnp.ones_like(factor_DM)[..., None], factor_DM[..., None]
    while powers.shape[-1] < length:
        powers = jnp.concatenate([powers, powers * factor], axis=-1)
        factor = factor * factor
    return powers[..., :length]


def matrix_power(A_DNN: jax.Array, exponent: int) -> jax.Array:
    """A^exponent, by squaring."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(A_DNN, exponent)


def power_less_one(E_DNN: jax.Array, exponent: int) -> jax.Array:
    """(I + E)^exponent - I, by squaring. No digit of a small E is lost, however near the identity
    the power is."""
    result = jnp.zeros_like(E_DNN)
    for bit in f"{exponent:b}":  # (I + F)^2 - I = 2 F + F^2
        result = 2 * result + einsum("dij,djk->dik", result, result)
        if bit == "1":
            result = result + E_DNN + einsum("dij,djk->dik", E_DNN, result)
    return result


def krylov(A_DNN: jax.Array, start_DRN: jax.Array, length: int) -> jax.Array:
    """A^l start, l = 0 .. length - 1, of R vectors: [D, length, R, N]."""
    vectors, power = start_DRN[:, None], A_DNN
    while vectors.shape[1] < length:
        vectors = jnp.concatenate([vectors, einsum("dij,dlrj->dlri", power, vectors)], axis=1)
        power = einsum("dij,djk->dik", power, power)
    return vectors[:, :length]


def dense_kernel(A_DNN: jax.Array, b_DN: jax.Array, c_DMN: jax.Array, length: int) -> jax.Array:
    """c A^l b, l = 0 .. length - 1: [D, M, length]."""
    chunk = 1 << math.isqrt(max(length - 1, 0)).bit_length()
    columns_DCN = krylov(A_DNN, b_DN[:, None], chunk)[:, :, 0]
    step_DNN = matrix_power(A_DNN, chunk)
    rows_DGMN = krylov(jnp.swapaxes(step_DNN, 1, 2), c_DMN, -(-length // chunk))
    kernel_DMGC = einsum("dgmn,dcn->dmgc", rows_DGMN, columns_DCN)
    return kernel_DMGC.reshape(*c_DMN.shape[:2], -1)[..., :length]


def final_state(A_DNN: jax.Array, b_DN: jax.Array, u_BTD: jax.Array) -> jax.Array:
    """The state [B, D, N] after u, from zero: what a convolution leaves out."""
    batch, length, channels = u_BTD.shape
    chunk = min(CHUNK, length)
    # Zeros in front of the first token leave the zero state alone.
    u_BTD = jnp.pad(u_BTD, ((0, 0), (-length % chunk, 0), (0, 0)))
    u_GBCD = jnp.moveaxis(u_BTD.reshape(batch, -1, chunk, channels), 1, 0)
    write_DCN = krylov(A_DNN, b_DN[:, None], chunk)[:, ::-1, 0]
    step_DNN = matrix_power(A_DNN, chunk)

    def advance(x_BDN: jax.Array, u_BCD: jax.Array) -> tuple[jax.Array, None]:
        x_BDN = einsum("dnk,bdk->bdn", step_DNN, x_BDN)
        return x_BDN + einsum("dcn,bcd->bdn", write_DCN, u_BCD), None

    zeros_BDN = jnp.zeros((batch, channels, b_DN.shape[-1]), jnp.float32)
    return lax.scan(advance, zeros_BDN, u_GBCD)[0]


def dense_scan(
    A_DNN: jax.Array,
    b_DN: jax.Array,
    c_DMN: jax.Array,
    u_BTD: jax.Array,
    *,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the state after the last token [B, D, N], all float32.

    initial_state [B, D, N] (None: zeros) belongs to the first token's segment; the state starts
    from zero wherever segment_ids [B, T] changes."""
    batch, length, channels = u_BTD.shape
    chunk = min(CHUNK, length)
    write_DCN = krylov(A_DNN, b_DN[:, None], chunk)[:, :, 0]
    read_DCMN = krylov(jnp.swapaxes(A_DNN, 1, 2), einsum("dmn,dnk->dmk", c_DMN, A_DNN), chunk)
    kernel_DMC = einsum("dmn,dcn->dmc", c_DMN, write_DCN)
    lag_CC = jnp.arange(chunk)[:, None] - jnp.arange(chunk)[None, :]
    toeplitz_DMCC = jnp.where((lag_CC >= 0)[None, None], kernel_DMC[:, :, jnp.abs(lag_CC)], 0.0)
    # The run of equal ids that a token belongs to; that of the initial state is 0. Ids may come
    # back.
    runs_BT = None
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        runs_BT = jnp.pad(jnp.cumsum(changes, axis=1), ((0, 0), (1, 0)))

    def advance(power_DNN, carry, tokens):
        """One stretch of at most `chunk` tokens; `power_DNN` is A to their number."""
        (x_BDN, run_B), (u_BCD, runs_BC) = carry, tokens
        size = u_BCD.shape[1]
        toeplitz = toeplitz_DMCC[:, :, :size, :size]
        read, write = read_DCMN[:, :size], write_DCN[:, :size][:, ::-1]
        carried_BCDM = einsum("dcmn,bdn->bcdm", read, x_BDN)
        kept_BDN = einsum("dnk,bdk->bdn", power_DNN, x_BDN)
        if runs_BC is None:
            y_BCDM = einsum("dmts,bsd->btdm", toeplitz, u_BCD)
            x_BDN = kept_BDN + einsum("dcn,bcd->bdn", write, u_BCD)
            return (x_BDN, run_B), y_BCDM + carried_BCDM
        same_BCC = (runs_BC[:, :, None] == runs_BC[:, None, :]).astype(jnp.float32)
        y_BCDM = einsum("dmts,bts,bsd->btdm", toeplitz, same_BCC, u_BCD)
        continues_BC = (runs_BC == run_B[:, None])[..., None, None]
        last_B = runs_BC[:, -1]
        written_BCD = jnp.where((runs_BC == last_B[:, None])[..., None], u_BCD, 0.0)
        x_BDN = jnp.where((last_B == run_B)[:, None, None], kept_BDN, 0.0)
        x_BDN = x_BDN + einsum("dcn,bcd->bdn", write, written_BCD)
        return (x_BDN, last_B), y_BCDM + jnp.where(continues_BC, carried_BCDM, 0.0)

    # The backward pass recomputes a chunk from the state before it.
    advance = jax.checkpoint(advance)
    x_BDN = initial_state
    if x_BDN is None:
        x_BDN = jnp.zeros((batch, channels, b_DN.shape[-1]), jnp.float32)
    carry = (x_BDN, jnp.zeros((batch,), jnp.int32))
    whole = length // chunk * chunk
    chunks = jax.tree.map(
        lambda array: jnp.moveaxis(
            array[:, :whole].reshape(batch, -1, chunk, *array.shape[2:]), 1, 0
        ),
        (u_BTD, runs_BT),
    )
    carry, y_GBCDM = lax.scan(functools.partial(advance, matrix_power(A_DNN, chunk)), carry, chunks)
    y_BTDM = jnp.moveaxis(y_GBCDM, 0, 1).reshape(batch, whole, *y_GBCDM.shape[3:])
    if whole < length:
        rest = jax.tree.map(lambda array: array[:, whole:], (u_BTD, runs_BT))
        power_DNN = matrix_power(A_DNN, length - whole)
        carry, y_BCDM = advance(power_DNN, carry, rest)
        y_BTDM = jnp.concatenate([y_BTDM, y_BCDM], axis=1)
    return y_BTDM, carry[0]


def free_response(A_DNN: jax.Array, c_DMN: jax.Array, x_BDN: jax.Array, length: int) -> jax.Array:
    """c A^(t+1) x, t = 0 .. length - 1: [B, length, D, M], what the state before the first token
    adds to y."""
    chunk = min(CHUNK, length)
    read_DCMN = krylov(jnp.swapaxes(A_DNN, 1, 2), einsum("dmn,dnk->dmk", c_DMN, A_DNN), chunk)
    step_DNN = matrix_power(A_DNN, chunk)

    def advance(x_BDN: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return einsum("dnk,bdk->bdn", step_DNN, x_BDN), x_BDN

    _, x_GBDN = lax.scan(advance, x_BDN, length=-(-length // chunk))
    y_BGCDM = einsum("dcmn,gbdn->bgcdm", read_DCMN, x_GBDN)
    return y_BGCDM.reshape(x_BDN.shape[0], -1, *y_BGCDM.shape[3:])[:, :length]


def respond(
    A_DNN: jax.Array,
    b_DN: jax.Array,
    read: Callable[[], jax.Array],
    u_BTD: jax.Array,
    *,
    kernel: Callable[[int], jax.Array] | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the state after the last token [B, D, N], float32, by what serves this
    call.

    Without state and segments that is the convolution with kernel(length) [D, M, length], where
    there is one; else the recurrence with read() = c [D, M, N]. Where a mesh cuts time, each part
    is computed by itself in that way, and c is asked for in any case."""
    parts, (batch, length, _) = time_parts(), u_BTD.shape
    kernel_of = kernel if initial_state is None and segment_ids is None else None

    def run(
        u: jax.Array, state: jax.Array | None, ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if kernel_of is None:
            return dense_scan(A_DNN, b_DN, read(), u, initial_state=state, segment_ids=ids)
        kernel_DML = kernel_of(u.shape[1])
        y = long_convolution(
            jnp.repeat(u, kernel_DML.shape[1], axis=2), kernel_DML.reshape(-1, u.shape[1])
        )
        return y.reshape(*u.shape, -1), final_state(A_DNN, b_DN, u)

    if parts == 1:
        return run(u_BTD, initial_state, segment_ids)
    ids_Pn = continues_P = None
    if segment_ids is not None:
        ids_Pn = documents(segment_ids, batch, length, parts)
        continues_P = ids_Pn[:, -1] == 0
    with parts_as_batch():
        y_PnDM, written_PDN = run(to_parts(u_BTD, parts), None, ids_Pn)
    size = length // parts
    x_PDN, last_BDN = states_before(
        matrix_power(A_DNN, size), written_PDN, continues_P, initial_state, parts
    )
    free_PnDM = free_response(A_DNN, read(), x_PDN, size)
    if ids_Pn is not None:
        free_PnDM = jnp.where((ids_Pn == 0)[..., None, None], free_PnDM, 0.0)
    return to_whole(y_PnDM + free_PnDM, parts), last_BDN
