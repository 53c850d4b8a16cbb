"""Gated linear attention on TPU: chunks in order, the states of a step's heads in fast memory.

With the products of a chunk from `ops/tpu/chunk_products.py` (P: scores with their decays, q_start:
queries that read the state at the chunk's start, k_end: keys that write the one at its end) and the
state kept transposed, Z = S^T [V, K], so that its decay is a row:

    O = q_start Z^T + P V                                                                (1)
    Z' = Z . total + V^T k_end                                                           (2)

Backward runs over the chunks from last to first, with dZ' the gradient of the state at a chunk's
end:

    dP = dO V^T        dq_start = dO Z        dk_end = V dZ'                             (3)
    dV = k_end dZ'^T + P^T dO                                                            (4)
    dtotal = sum_v Z . dZ'                                                               (5)
    dZ = dZ' . total + dO^T q_start                                                      (6)

It needs the states at the starts of the chunks, which a first kernel recomputes from the inputs:
between forward and backward nothing is kept, and the states make one round trip through memory, K V
float32 values per C tokens."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..tpu import fit, gradients, heads
from ..tpu.decay import kind_of_decay
from ..tpu.heads import decayed
from ..tpu.kernel import Input, Output, call, interleave
from ..tpu.matmul import Matmul, matmul_dtype
from ..tpu.segments import by_segments

TUNING = heads.Tuning()
WALKS_BACKWARDS = True  # the rules take `reverse`
SUPPORTED = fit.SUPPORTED
WARNS_UNSUPPORTED = True
INPUTS = "BTGK BTGK BTHV decay state"
OUTPUTS = "BTHV state"
fits_forward = fit.fitted(f"{INPUTS} BT", OUTPUTS, TUNING)
fits_backward = fit.fitted(f"{INPUTS} BT {OUTPUTS}", INPUTS, TUNING)


def supports(q, k, v, decay_log, *others, **static):
    del k, others, static
    return fit.choose(q, v, decay_log, TUNING) is not None


@fits_forward
def forward(
    q,
    k,
    v,
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
        decay=decay,
        initial_state=grid.of_state(initial_state),
        o=Output(heads.flat_shape(v), grid.value_tile()),
        final_state=grid.state_output(),
        Z=grid.states(),
        plan=grid.plan,
    )
    results = call(functools.partial(gla_forward, kind=kind, scale=scale), grid, refs)
    return results.o.reshape(v.shape), results.final_state.reshape(initial_state.shape)


@fits_backward
def backward(
    q,
    k,
    v,
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
    """Gradients of q, k, v, decay_log and initial_state."""
    grid = heads.cut(q, v, TUNING, reverse, interpret)
    grid, segment_ids = by_segments(grid, segment_ids, num_segments)
    matmul = Matmul(matmul_dtype(q, k, v))
    kind, decay = kind_of_decay(matmul, grid, decay_log, segment_ids)
    refs = StatesRefs(
        k=grid.of_keys(k),
        v=grid.of_values(v),
        decay=decay,
        initial_state=grid.of_state(initial_state),
        starts=grid.chunk_states_output(),
        Z=grid.states(),
        plan=grid.plan,
    )
    starts = call(functools.partial(gla_states, kind=kind), grid, refs).starts

    kind, decay = kind_of_decay(matmul, grid, decay_log, segment_ids, backward=True)
    refs = BackwardRefs(
        v=grid.of_values(v, backward=True),
        do=grid.of_values(do, backward=True),
        q=grid.of_keys(q, backward=True),
        k=grid.of_keys(k, backward=True),
        starts=Input(starts, grid.chunk_states_tile(backward=True)),
        decay=decay,
        dfinal_state=grid.of_state(dfinal_state, backward=True),
        dq=gradients.key_head_output(q, grid),
        dk=gradients.key_head_output(k, grid),
        dv=gradients.value_output(v, grid),
        dinitial_state=grid.state_output(backward=True),
        ddecay_log=gradients.decay_output(decay_log, grid),
        dZ=grid.states(),
        plan=grid.plan,
    )
    # NOTE: see BackwardRefs. In reverse, the decays are what is best moved.
    first = ("decay",) if reverse else ()
    results = call(functools.partial(gla_backward, kind=kind, scale=scale), grid, refs, first)
    return (
        gradients.sum_of_parts(results.dq, q, grid),
        gradients.sum_of_parts(results.dk, k, grid),
        results.dv.reshape(v.shape),
        gradients.decay_gradient(results.ddecay_log, decay_log, grid),
        results.dinitial_state.reshape(initial_state.shape),
    )


class ForwardRefs(NamedTuple):
    q: Any  # [1, C, key heads * K]
    k: Any  # [1, C, key heads * K]
    v: Any  # [1, C, heads * V]
    decay: Any  # of the kind of decay
    initial_state: Any  # [1, heads, K, V]
    o: Any  # [1, C, heads * V]
    final_state: Any  # [1, heads, K, V]
    Z: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def gla_forward(refs: ForwardRefs, *, kind, scale):
    grid, matmul = kind.grid, kind.matmul
    step = grid.step(refs.plan)
    step.load_states(refs.Z, refs.initial_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)

    def head(h):
        q = grid.key(refs.q, h, valid)  # [C, K]
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid)  # [C, V]
        chunk = yield from decay.products(h, q, k)
        Z = refs.Z[h]  # [V, K]
        o_state = matmul.nt(chunk.q_start, Z)  # [C, V]
        written = decay.written(h, v, k, chunk.k_end)  # [V, K]
        yield
        o_chunk = matmul.nn(chunk.scores, v)  # [C, V]
        refs.Z[h] = decayed(Z, chunk.total) + written  # Eq. 2
        yield
        step.write(refs.o, h, scale * (o_state + o_chunk))  # Eq. 1

    interleave(head(h) for h in range(grid.heads))
    step.store_states(refs.final_state, refs.Z)


class StatesRefs(NamedTuple):
    k: Any  # [1, C, key heads * K]
    v: Any  # [1, C, heads * V]
    decay: Any  # of the kind of decay
    initial_state: Any  # [1, heads, K, V]
    starts: Any  # Z at the chunk's start [1, 1, heads, V, K]
    Z: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def gla_states(refs: StatesRefs, *, kind):
    grid = kind.grid
    step = grid.step(refs.plan)
    step.load_states(refs.Z, refs.initial_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)

    def head(h):
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid)  # [C, V]
        k_end, total = yield from decay.ends(h, k)
        Z = refs.Z[h]  # [V, K]
        refs.starts[0, 0, h] = Z
        written = decay.written(h, v, k, k_end)  # [V, K]
        yield
        refs.Z[h] = decayed(Z, total) + written  # Eq. 2

    interleave(head(h) for h in range(grid.heads))


class BackwardRefs(NamedTuple):
    # NOTE: what is loaded least comes first: short of scalar registers, the compiler moves the
    # first inputs' addresses to memory, and libtpu 0.0.42.1 lets every load through such an address
    # wait for the stores before it.
    v: Any  # [1, C, heads * V]
    do: Any  # [1, C, heads * V]
    q: Any  # [1, C, key heads * K]
    k: Any  # [1, C, key heads * K]
    starts: Any  # Z at the chunk's start [1, 1, heads, V, K]
    decay: Any  # of the kind of decay
    dfinal_state: Any  # [1, heads, K, V]
    dq: Any  # [1, C, key heads * K]
    dk: Any  # [1, C, key heads * K]
    dv: Any  # [1, C, heads * V]
    dinitial_state: Any  # [1, heads, K, V]
    ddecay_log: Any  # [1, C, heads * K] or [1, 1, 1, heads, C], None without decay
    dZ: Any  # carry [heads, V, K]
    plan: Any  # of `SegmentSteps`, None for one state


def gla_backward(refs: BackwardRefs, *, kind, scale):
    grid, matmul = kind.grid, kind.matmul
    step = grid.step(refs.plan, backward=True)
    step.load_states(refs.dZ, refs.dfinal_state)
    valid = step.valid()
    decay = kind.load(refs.decay, step)
    dq, dk = (gradients.KeyHeadSum(ref, step) for ref in (refs.dq, refs.dk))

    def head(h):
        q = grid.key(refs.q, h, valid)  # [C, K]
        k = grid.key(refs.k, h, valid)  # [C, K]
        v = grid.value(refs.v, h, valid)  # [C, V]
        do = scale * grid.value(refs.do, h, valid).astype(jnp.float32)
        do = do.astype(matmul.dtype)  # [C, V]
        Z, dZ = refs.starts[0, 0, h], refs.dZ[h]  # [V, K]
        dscores = matmul.nt(do, v)  # [C, C], Eq. 3
        dq_start, dk_end = matmul.nn(do, Z), matmul.nn(v, dZ)  # [C, K], Eq. 3
        chunk = yield from decay.products(h, q, k)
        dv_state, dv_chunk = matmul.nt(chunk.k_end, dZ), matmul.tn(chunk.scores, do)  # [C, V]
        read = matmul.tn(do, chunk.q_start)  # [V, K]
        dtotal = jnp.sum(Z * dZ, 0, keepdims=True)  # [1, K], Eq. 5
        yield
        step.write(refs.dv, h, dv_state + dv_chunk)  # Eq. 4
        refs.dZ[h] = decayed(dZ, chunk.total) + read  # Eq. 6
        of = yield from decay.adjoint(h, chunk, q, k, dscores, dq_start, dk_end, dtotal)
        gradients.write_decay(refs.ddecay_log, h, of.log, step)
        dq.add(h, of.q)
        dk.add(h, of.k)

    interleave(head(h) for h in range(grid.heads))
    step.store_states(refs.dinitial_state, refs.dZ)
