"""The (gated) delta rule on TPU: chunks in order, the states of a step's heads in fast memory.

With the products of a chunk from `ops/tpu/chunk_products.py`, once of queries and keys (P, Q0 =
q_start, K1 = k_end) and once of keys and keys (KK strictly below the diagonal, K0 = q_start), and
the state kept transposed, Z = S^T [V, K]:

    M = (I + beta . KK)^-1        U = M (beta . V)        W = M (beta . K0)              (1)
    N = U - W Z^T                                                                        (2)
    O = Q0 Z^T + P N                                                                     (3)
    Z' = Z . total + N^T K1                                                              (4)

N are the corrected values that the chunk's tokens write (Yang et al., 2024, arXiv 2406.06484,
section 3, with decays). Backward runs over the chunks from last to first, with dZ' the gradient of
the state at a chunk's end:

    dN = P^T dO + K1 dZ'^T                                                               (5)
    D = M^T dN                    dV = beta . D                                          (6)
    dP = dO N^T                                                                          (7)
    dA = -D N^T                   for i > j                                              (8)
    dbeta = (D . (V - K0 Z^T)) 1 + (dA . KK) 1                                           (9)
    dQ0 = dO Z                    dK0 = -(beta . D) Z     dK1 = N dZ'                    (10)
    dtotal = sum_v Z . dZ'                                                               (11)
    dZ = dZ' . total + dO^T Q0 - dN^T W                                                  (12)

dM never appears: N solves N + A N = beta . (V - K0 Z^T) with A = beta . KK, so D is the gradient of
the right side, and dA that of A. The products' adjoints take dP, dQ0, dK1 and dtotal to q, k and
log a, and dKK = beta . dA and dK0 to k (on both sides) and log a. The states at the starts of
chunks come from a first kernel; between forward and backward nothing is kept.

**Precision.** With equal keys and beta near 2 the state is reflected, not forgotten: the rows of M
alternate in sign, and what is left of their sums is smaller than the rounding of 128 terms to 8
bits. So what is multiplied by M or summed into a state keeps 16 bits (`Matmul.finer`), and M meets
V and K0 before it meets the state, whose large part cancels in V - K0 Z^T."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..tpu import fit, gradients, heads
from ..tpu.chunk_products import Products
from ..tpu.decay import kind_of_decay
from ..tpu.heads import decayed
from ..tpu.inverse import unit_triangular_inverse
from ..tpu.kernel import Input, Output, call, interleave
from ..tpu.matmul import Matmul, matmul_dtype
from ..tpu.segments import by_segments

TUNING = heads.Tuning(live_of_channels=80)
WALKS_BACKWARDS = True  # the rules take `reverse`
SUPPORTED = fit.SUPPORTED
WARNS_UNSUPPORTED = True
INPUTS = "BTGK BTGK BTHV BTH decay state"
OUTPUTS = "BTHV state"
fits_forward = fit.fitted(f"{INPUTS} BT", OUTPUTS, TUNING)
fits_backward = fit.fitted(f"{INPUTS} BT {OUTPUTS}", INPUTS, TUNING)


def supports(q, k, v, beta, decay_log, *others, **static):
    del k, beta, others, static
    return fit.choose(q, v, decay_log, TUNING) is not None


@fits_forward
def forward(
    q,
    k,
    v,
    beta,
    decay_log,
    initial_state,
    segment_ids,
    *,
    scale,
    num_segments=None,
    reverse=False,
    interpret=False,
):
    """o in v's dtype and the final state in float32; shapes as in `api.py`."""
    grid = heads.cut(q, v, TUNING, reverse, interpret)
    grid, segment_ids = by_segments(grid, segment_ids, num_segments)
    matmul = Matmul(matmul_dtype(q, k, v))
    kind, decay = kind_of_decay(matmul, grid, decay_log, segment_ids)
    refs = ForwardRefs(
        q=grid.of_keys(q),
        k=grid.of_keys(k),
        v=grid.of_values(v),
        beta=grid.of_rows(beta.swapaxes(1, 2)),
        decay=decay,
        initial_state=grid.of_state(initial_state),
        o=Output(heads.flat_shape(v), grid.value_tile()),
        final_state=grid.state_output(),
        Z=grid.states(),
        plan=grid.plan,
    )
    results = call(functools.partial(delta_forward, kind=kind, scale=scale), grid, refs)
    return results.o.reshape(v.shape), results.final_state.reshape(initial_state.shape)


@fits_backward
def backward(
    q,
    k,
    v,
    beta,
    decay_log,
    initial_state,
    segment_ids,
    do,
    dfinal_state,
    *,
    scale,
    num_segments=None,
    reverse=False,
    interpret=False,
):
    """Gradients of q, k, v, beta, decay_log and initial_state."""
    grid = heads.cut(q, v, TUNING, reverse, interpret)
    grid, segment_ids = by_segments(grid, segment_ids, num_segments)
    matmul = Matmul(matmul_dtype(q, k, v))
    beta_BHT = beta.swapaxes(1, 2)
    kind, decay = kind_of_decay(matmul, grid, decay_log, segment_ids)
    refs = StatesRefs(
        k=grid.of_keys(k),
        v=grid.of_values(v),
        beta=grid.of_rows(beta_BHT),
        decay=decay,
        initial_state=grid.of_state(initial_state),
        starts=grid.chunk_states_output(),
        Z=grid.states(),
        plan=grid.plan,
    )
    starts = call(functools.partial(delta_states, kind=kind), grid, refs).starts

    kind, decay = kind_of_decay(matmul, grid, decay_log, segment_ids, backward=True)
    refs = BackwardRefs(
        q=grid.of_keys(q, backward=True),
        k=grid.of_keys(k, backward=True),
        v=grid.of_values(v, backward=True),
        do=grid.of_values(do, backward=True),
        beta=grid.of_rows(beta_BHT, backward=True),
        starts=Input(starts, grid.chunk_states_tile(backward=True)),
        decay=decay,
        dfinal_state=grid.of_state(dfinal_state, backward=True),
        dq=gradients.key_head_output(q, grid),
        dk=gradients.key_head_output(k, grid),
        dv=gradients.value_output(v, grid),
        dbeta=gradients.token_output(grid),
        dinitial_state=grid.state_output(backward=True),
        ddecay_log=gradients.decay_output(decay_log, grid),
        dZ=grid.states(),
        plan=grid.plan,
    )
    # NOTE: see BackwardRefs of gated linear attention.
    first = ("decay",) if reverse else ()
    results = call(functools.partial(delta_backward, kind=kind, scale=scale), grid, refs, first)
    return (
        gradients.sum_of_parts(results.dq, q, grid),
        gradients.sum_of_parts(results.dk, k, grid),
        results.dv.reshape(v.shape),
        grid.from_rows(results.dbeta).swapaxes(1, 2),
        gradients.decay_gradient(results.ddecay_log, decay_log, grid),
        results.dinitial_state.reshape(initial_state.shape),
    )


class Writes(NamedTuple):
    """What a chunk writes, as a function of the state at its start: N = U - W Z^T."""

    overlaps: Products  # of keys and keys
    KK: jax.Array  # [C, C], of earlier columns
    M: jax.Array  # [C, C]
    U: jax.Array  # [C, V]
    W: jax.Array  # [C, K]


def chunk_writes(decay, h, k, v, beta):
    """The `Writes` of head h, for k [C, K], v [C, V] and beta [C, 1]."""
    grid, fine = decay.grid, decay.matmul.finer
    overlaps = yield from decay.products(h, k, k)
    KK = overlaps.scores * grid.strictly_lower()
    M = yield from unit_triangular_inverse(fine, beta * KK, grid.reverse)  # Eq. 1
    yield
    U, W = fine.nn(M, beta * v), fine.nn(M, beta * overlaps.q_start)  # Eq. 1
    yield
    return Writes(overlaps, KK, M, U, W)


class ForwardRefs(NamedTuple):
    q: Any  # [1, C, key heads * K]
    k: Any  # [1, C, key heads * K]
    v: Any  # [1, C, heads * V]
    beta: Any  # [1, 1, 1, heads, C]
    decay: Any  # of the kind of decay
    initial_state: Any  # [1, heads, K, V]
    o: Any  # [1, C, heads * V]
    final_state: Any  # [1, heads, K, V]
    Z: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def delta_forward(refs: ForwardRefs, *, kind, scale):
    grid, matmul = kind.grid, kind.matmul
    fine = matmul.finer
    step = grid.step(refs.plan)
    step.load_states(refs.Z, refs.initial_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)
    betas = refs.beta[0, 0, 0].T  # [C, heads]

    def head(h):
        q = grid.key(refs.q, h, valid)  # [C, K]
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid).astype(jnp.float32)  # [C, V]
        writes = yield from chunk_writes(decay, h, k, v, betas[:, h : h + 1])
        chunk = yield from decay.products(h, q, k)
        Z = refs.Z[h]  # [V, K]
        N = writes.U - fine.nt(writes.W, Z)  # [C, V], Eq. 2
        o_state = matmul.nt(chunk.q_start, Z)  # [C, V]
        yield
        o_chunk = fine.nn(chunk.scores, N)  # [C, V]
        written = fine.tn(N, chunk.k_end)  # [V, K]
        yield
        refs.Z[h] = decayed(Z, chunk.total) + written  # Eq. 4
        step.write(refs.o, h, scale * (o_state + o_chunk))  # Eq. 3

    interleave(head(h) for h in range(grid.heads))
    step.store_states(refs.final_state, refs.Z)


class StatesRefs(NamedTuple):
    k: Any  # [1, C, key heads * K]
    v: Any  # [1, C, heads * V]
    beta: Any  # [1, 1, 1, heads, C]
    decay: Any  # of the kind of decay
    initial_state: Any  # [1, heads, K, V]
    starts: Any  # Z at the chunk's start [1, 1, heads, V, K]
    Z: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def delta_states(refs: StatesRefs, *, kind):
    grid, fine = kind.grid, kind.matmul.finer
    step = grid.step(refs.plan)
    step.load_states(refs.Z, refs.initial_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)
    betas = refs.beta[0, 0, 0].T  # [C, heads]

    def head(h):
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid).astype(jnp.float32)  # [C, V]
        writes = yield from chunk_writes(decay, h, k, v, betas[:, h : h + 1])
        Z = refs.Z[h]  # [V, K]
        refs.starts[0, 0, h] = Z
        N = writes.U - fine.nt(writes.W, Z)  # [C, V], Eq. 2
        yield
        written = fine.tn(N, writes.overlaps.k_end)  # [V, K]
        yield
        refs.Z[h] = decayed(Z, writes.overlaps.total) + written  # Eq. 4

    interleave(head(h) for h in range(grid.heads))


class BackwardRefs(NamedTuple):
    q: Any  # [1, C, key heads * K]
    k: Any  # [1, C, key heads * K]
    v: Any  # [1, C, heads * V]
    do: Any  # [1, C, heads * V]
    beta: Any  # [1, 1, 1, heads, C]
    starts: Any  # Z at the chunk's start [1, 1, heads, V, K]
    decay: Any  # of the kind of decay
    dfinal_state: Any  # [1, heads, K, V]
    dq: Any  # [1, C, key heads * K]
    dk: Any  # [1, C, key heads * K]
    dv: Any  # [1, C, heads * V]
    dbeta: Any  # [1, 1, 1, heads, C]
    dinitial_state: Any  # [1, heads, K, V]
    ddecay_log: Any  # [1, C, heads * K] or [1, 1, 1, heads, C], None without decay
    dZ: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def delta_backward(refs: BackwardRefs, *, kind, scale):
    grid, matmul = kind.grid, kind.matmul
    fine = matmul.finer
    step = grid.step(refs.plan, backward=True)
    step.load_states(refs.dZ, refs.dfinal_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)
    betas = refs.beta[0, 0, 0].T  # [C, heads]
    row, column = grid.places()
    dq_sum, dk_sum = (gradients.KeyHeadSum(ref, step) for ref in (refs.dq, refs.dk))

    def head(h):
        q = grid.key(refs.q, h, valid)  # [C, K]
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid).astype(jnp.float32)  # [C, V]
        beta = betas[:, h : h + 1]  # [C, 1]
        do = scale * grid.value(refs.do, h, valid).astype(jnp.float32)  # [C, V]
        Z, dZ = refs.starts[0, 0, h], refs.dZ[h]  # [V, K]
        overlaps, KK, M, U, W = yield from chunk_writes(decay, h, k, v, beta)
        chunk = yield from decay.products(h, q, k)
        N = U - fine.nt(W, Z)  # [C, V], Eq. 2
        missing = v - fine.nt(overlaps.q_start, Z)  # [C, V], V - K0 Z^T
        dN = fine.tn(chunk.scores, do) + fine.nt(chunk.k_end, dZ)  # [C, V], Eq. 5
        yield
        D = fine.tn(M, dN)  # [C, V], Eq. 6
        yield
        dscores, dA = fine.nt(do, N), -fine.nt(D, N)  # [C, C], Eqs. 7 and 8
        dv = beta * D  # [C, V], Eq. 6
        dq_start, dk_start = matmul.nn(do, Z), -matmul.nn(dv, Z)  # [C, K], Eq. 10
        dk_end = matmul.nn(N, dZ)  # [C, K], Eq. 10
        read = matmul.tn(do, chunk.q_start) - fine.tn(dN, W)  # [V, K]
        dtotal = jnp.sum(Z * dZ, 0, keepdims=True)  # [1, K], Eq. 11
        yield
        dA *= (row > column).astype(jnp.float32)
        dbeta = jnp.sum(D * missing, 1, keepdims=True)
        dbeta += jnp.sum(dA * KK, 1, keepdims=True)  # [C, 1], Eq. 9
        # As a row [1, C].
        dbeta = jnp.sum(jnp.where(row == column, dbeta, 0.0), 0, keepdims=True)
        refs.dbeta[0, 0, 0, h : h + 1] = dbeta
        step.write(refs.dv, h, dv)
        refs.dZ[h] = decayed(dZ, chunk.total) + read  # Eq. 12
        of_reads = yield from decay.adjoint(h, chunk, q, k, dscores, dq_start, dk_end, dtotal)
        # dk_end and dtotal are counted by the adjoint above.
        zeros = jnp.zeros_like(dk_end), jnp.zeros_like(dtotal)
        of_writes = yield from decay.adjoint(h, overlaps, k, k, beta * dA, dk_start, *zeros)
        if refs.ddecay_log is not None:
            gradients.write_decay(refs.ddecay_log, h, of_reads.log + of_writes.log, step)
        dk = of_reads.k + of_writes.q + of_writes.k
        dq_sum.add(h, of_reads.q)
        dk_sum.add(h, dk)

    interleave(head(h) for h in range(grid.heads))
    step.store_states(refs.dinitial_state, refs.dZ)
