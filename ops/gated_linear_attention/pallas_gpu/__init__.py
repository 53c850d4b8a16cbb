"""Gated linear attention on NVIDIA GPUs: chunks in order where states pass, all chunks at once
where they need not. (`ops/gpu/__init__.py` explains the words.)

With the products of decays of `ops/gpu/decay.py`, S the state at the start of a chunk and S' the
state at its end:

    P  = W . (Q K^T)                                                                  (1)
    O  = scale (prefix . (Q S) + P V)                                                 (2)
    S' = total S + K^T (suffix . V)                                                   (3)

Forward is one kernel: a program holds the state of one head and some of its value channels in
registers and walks over the chunks. With few heads these programs do not fill a GPU, and time is
cut into parts.

Backward, with dS' the gradient of the state at a chunk's end:

    dS = total dS' + scale Q^T (prefix . dO)                                          (4)
    dP = scale dO V^T                                                                 (5)
    dV = suffix . (K dS') + scale P^T dO                                              (6)
    dQ = scale prefix . (dO S^T) + (W . dP) K                                         (7)
    dK = suffix . (V dS'^T) + (W . dP)^T Q                                            (8)

and the gradient of the logs is Eq. 4 of `decay.py` with

    W dW = P . dP
    prefix dprefix = sum over channels of Q . (the first term of Eq. 7)
    suffix dsuffix = sum over channels of K . (the first term of Eq. 8)
    dtotal = sum over channels of S . dS'

Two kernels walk over the chunks and write the states S and the gradients dS', rounded to the dtype
of the matmuls that read them; then one kernel takes all chunks at once. Between forward and
backward nothing is kept.

A decay for each channel is applied before (`ops/gpu/channel_decay.py`): the kernels here read P,
scale prefix . Q and suffix . K in the place of q and k, piece by piece (`ops/gpu/pieces.py`)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...gpu import pieces
from ...gpu import tiles as gpu
from ...gpu.channel_decay import chunk_inputs, has_channel_decay
from ...gpu.chunks import ChunkInputs, Sizes, chunk_length
from ...gpu.gradients import gradient_shapes, input_gradients
from .gradients import GradientInputs, chunk_gradients
from .walks import MAX_WIDTH, ForwardInputs, StateInputs, walk, walk_states

WALKS_BACKWARDS = True  # the rules take `reverse`
MAX_SIZE = 256  # of K and V: what fits registers
SUPPORTED = f"float32 or bfloat16, K and V up to {MAX_SIZE}"


def supports(q, k, v, decay_log, initial_state, segment_ids, *_, scale) -> bool:
    """Whether the kernels take these arrays: what SUPPORTED says, where jax has the lowering."""
    del decay_log, initial_state, segment_ids, scale
    return (
        gpu.available()
        and max(q.shape[-1], v.shape[-1]) <= MAX_SIZE
        and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in (q, k, v))
    )


def forward(
    q, k, v, decay_log, initial_state, segment_ids, *, scale, reverse=False, interpret=False
):
    """o [B, T, H, V] in v's dtype and the final state in float32; shapes as in `api.py`."""
    rule = functools.partial(_forward, scale=scale, reverse=reverse, interpret=interpret)
    tokens = q, k, v, decay_log
    if not has_channel_decay(decay_log):
        return rule(*tokens, initial_state, segment_ids)
    return pieces.forward(rule, tokens, initial_state, segment_ids, reverse)


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
    reverse=False,
    interpret=False,
):
    """Gradients of q, k, v, decay_log and initial_state."""
    rule = functools.partial(_backward, scale=scale, reverse=reverse, interpret=interpret)
    tokens, rest = (q, k, v, decay_log), (initial_state, segment_ids, do, dfinal_state)
    if not has_channel_decay(decay_log):
        return rule(*tokens, *rest)
    final_state = functools.partial(_final_state, scale=scale, reverse=reverse, interpret=interpret)
    return pieces.backward(rule, final_state, tokens, *rest, reverse)


# --- One piece of time


def _forward(q, k, v, decay_log, initial_state, segment_ids, *, scale, reverse, interpret):
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, reverse, interpret)
    _, tile_count = gpu.tiling(sizes.value, sizes.state_width)
    parts = gpu.split_time(sizes.chunks, sizes.batch * sizes.heads * tile_count)
    starts = _part_starts(sizes, inputs, v, initial_state, parts, reverse=False)
    o, ends = walk(sizes, ForwardInputs(inputs, v, starts))
    return o, ends[:, -1]


def _final_state(q, k, v, decay_log, initial_state, segment_ids, *, scale, reverse, interpret):
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, reverse, interpret)
    starts = _part_starts(sizes, inputs, v, initial_state, _state_parts(sizes), reverse=False)
    walked = walk_states(sizes, StateInputs(inputs, v, starts), reverse=False, keep=False)
    return walked.ends[:, -1]


def _backward(
    q, k, v, decay_log, initial_state, segment_ids, do, dfinal_state, *, scale, reverse, interpret
):
    sizes, inputs = _inputs(q, k, v, decay_log, segment_ids, scale, reverse, interpret)
    parts = _state_parts(sizes)
    starts = _part_starts(sizes, inputs, v, initial_state, parts, reverse=False)
    S, _ = walk_states(sizes, StateInputs(inputs, v, starts), reverse=False, keep=True)
    starts = _part_starts(sizes, inputs, do, dfinal_state, parts, reverse=True)
    dS, ends = walk_states(sizes, StateInputs(inputs, do, starts), reverse=True, keep=True)
    shapes = gradient_shapes(sizes, inputs, q, k, v, decay_log)
    gradients = chunk_gradients(sizes, GradientInputs(inputs, v, do, S, dS), shapes)
    dq, dk, dlog = input_gradients(sizes, gradients, q, k, decay_log, segment_ids, scale)
    return dq, dk, gradients.dv, dlog, ends[:, 0]


def _inputs(
    q, k, v, decay_log, segment_ids, scale, reverse, interpret
) -> tuple[Sizes, ChunkInputs]:
    sizes = Sizes(
        *v.shape[:3],
        key=q.shape[-1],
        value=v.shape[-1],
        chunk=chunk_length(v.shape[1]),
        dtype=gpu.matmul_dtype(q, k, v),
        scale=scale,
        reverse=reverse,
        interpret=interpret,
    )
    sizes, inputs, _ = chunk_inputs(sizes, q, k, decay_log, segment_ids)
    return sizes, inputs


# --- Parts of time


def _state_parts(sizes: Sizes) -> int:
    """The number of parts for `walk_states`."""
    tiles = (gpu.tiling(size, MAX_WIDTH)[1] for size in (sizes.key, sizes.value))
    programs = math.prod(tiles) * sizes.batch * sizes.heads
    return gpu.split_time(sizes.chunks, programs)


def _part_starts(
    sizes: Sizes,
    inputs: ChunkInputs,
    x: jax.Array,
    initial_state: jax.Array,
    parts: int,
    reverse: bool,
) -> jax.Array:
    """The states that enter the parts [B, parts, H, K, V], float32.

    x: v, or do in reverse, where the gradients of the states run from the last part to the first
    and `initial_state` is that of the final state."""
    initial_state = initial_state.astype(jnp.float32)[:, None]
    if parts == 1:
        return initial_state
    zeros = jnp.zeros((sizes.batch, parts, *initial_state.shape[2:]), jnp.float32)
    increments = walk_states(sizes, StateInputs(inputs, x, zeros), reverse, keep=False).ends
    totals = _part_totals(sizes, inputs, parts)
    return gpu.part_starts(jnp.multiply, totals, increments, initial_state, reverse)


def _part_totals(sizes: Sizes, inputs: ChunkInputs, parts: int) -> jax.Array:
    """The product of the decays of each part, [B or 1, parts, H or 1, K or 1, 1]."""
    part_length = pl.cdiv(sizes.chunks, parts)  # in chunks
    if inputs.total is not None:
        total = jnp.pad(
            inputs.total,
            ((0, 0), (0, 0), (0, parts * part_length - sizes.chunks), (0, 0)),
            constant_values=1.0,
        )
        total = total.reshape(*total.shape[:2], parts, part_length, -1).prod(3)
        return total.swapaxes(1, 2)[..., None]
    tokens = part_length * sizes.chunk
    start = jnp.arange(parts) * tokens
    start, end = (jnp.minimum(x, sizes.length) for x in (start, start + tokens))
    if inputs.log is None:
        total = jnp.ones((1, parts, 1), jnp.float32)
    elif inputs.log.ndim == 1:
        log = inputs.log.astype(jnp.float32)
        total = jnp.exp((end - start)[None, :, None] * log[None, None, :])
    else:
        pad = parts * tokens - sizes.length
        log = inputs.log[:, ::-1] if sizes.reverse else inputs.log
        log = jnp.pad(log.astype(jnp.float32), ((0, 0), (0, pad), (0, 0)))
        total = jnp.exp(log.reshape(sizes.batch, parts, tokens, -1).sum(2))
    if inputs.numbers is not None:
        numbers = inputs.numbers[:, ::-1] if sizes.reverse else inputs.numbers
        before = numbers[:, jnp.maximum(start - 1, 0)]
        continues = before == numbers[:, jnp.maximum(end - 1, 0)]
        total = jnp.where(continues[..., None], total, 0.0)
    return total[..., None, None]
