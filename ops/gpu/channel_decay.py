"""Products of decays over the intervals of a chunk, where each channel has its own decay.

W_ijc of `decay.py` then has a third axis and is never formed. A block of 2b tokens splits in the
middle, m: with i in its second half and j in its first,

    W_ij = (a_m .. a_i) (a_{j+1} .. a_{m-1})                                          (1)

With X = x . factor, of queries and the first factor in second halves, of keys and the second factor
in first halves, X X^T holds the scores of all those pairs. One matmul for each b = 1, 2, 4 .. C/2
covers all i > j, and i = j needs no decay. So does

    Q_start = scale prefix . Q        K_end = suffix . K        K_start = prefix . K   (2)

Backward, with M the gradient of the scores of the pairs of one b and of their mirror images,

    dX = M X                                                                          (3)
    dl_t = sum over the rows i of X whose factor has the decay a_t of X_i dX_i        (4)

for each b, and likewise for the factors of Eq. 2 and for total.

A first kernel writes Q_start, K_end, total and the scores to memory, from where the kernels of an
op take them in the place of queries, keys and decays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from ..framework.segments import numbers as segment_numbers
from . import tiles as gpu
from .chunks import ChunkInputs, Sizes, key_gradient_dtypes

MAX_WIDTH = 32  # channels of a tile


class KeyInputs(NamedTuple):
    """What the kernels here read, as arrays or as refs."""

    q: Any  # [B, T, HK, K]
    k: Any  # [B, T, HK, K]
    log: Any  # [B, T, H, K]
    numbers: Any  # [B, T], of segments, or None


class ChannelDecay(NamedTuple):
    """What `channel_scores` computes; also the cotangents of that, and refs to either.

    In the dtype of matmuls, but for total and key_scores, which are float32."""

    scores: Any  # P [B, H, G C, C], of queries with keys, times `scale`
    q_start: Any  # Q_start [B, H, G C, K]
    k_end: Any  # K_end [B, H, G C, K]
    total: Any  # [B, H, G, K]
    key_scores: Any = None  # KK [B, H, G C, C], of keys with earlier keys; None unless asked for
    k_start: Any = None  # K_start [B, H, G C, K]; None unless asked for


def has_channel_decay(decay_log: jax.Array | None) -> TypeGuard[jax.Array]:
    """Whether decays are [B, T, H, K]."""
    return decay_log is not None and decay_log.ndim == 4


def chunk_inputs(
    sizes: Sizes,
    q: jax.Array,
    k: jax.Array,
    decay_log: jax.Array | None,
    segment_ids: jax.Array | None,
    key_scores: bool = False,
) -> tuple[Sizes, ChunkInputs, ChannelDecay | None]:
    """What the kernels of an op take of q, k and their decays, of whatever kind.

    Returns the sizes with the factor that is still to be applied, the inputs, and what
    `channel_scores` computed (None: no decay for each channel)."""
    numbers = segment_numbers(segment_ids)
    if not has_channel_decay(decay_log):
        return sizes, ChunkInputs(q, k, decay_log, numbers), None
    channels = channel_scores(sizes, KeyInputs(q, k, decay_log, numbers), key_scores)
    inputs = ChunkInputs(
        channels.q_start, channels.k_end, scores=channels.scores, total=channels.total
    )
    return dataclasses.replace(sizes, scale=1.0), inputs, channels


# --- The kernels


class _Level(NamedTuple):
    """How blocks of 2b tokens split in the middle, b = 2^n."""

    second: jax.Array  # [C, 1] bool: the row is in a second half
    mask: jax.Array  # [C, C] bool: the decay of token t (column) is in the factor of a row
    pairs: jax.Array  # [C, C] bool: row and column are in different halves of one block


def _level(n: Any, chunk: int) -> _Level:
    b = jnp.left_shift(1, n)
    row, column = gpu.indices(chunk, chunk)
    second = (row & b) != 0
    after = jnp.where(second, column <= row, column > row)
    distance = row ^ column  # below b: in one half; below 2b: in one block
    halves = (gpu.indices(chunk, 1)[0] & b) != 0
    return _Level(halves, after & (distance < b), (distance >= b) & (distance < 2 * b))


def _mirrored_mask(n: Any, chunk: int) -> jax.Array:
    """`_Level.mask`, rows and columns exchanged."""
    b = jnp.left_shift(1, n)
    row, column = gpu.indices(chunk, chunk)
    after = jnp.where((column & b) != 0, row <= column, row > column)
    return after & ((row ^ column) < b)


def _levels(chunk: int) -> int:
    """The number of b = 1, 2, 4 .. C/2."""
    return chunk.bit_length() - 1


def _load(
    sizes: Sizes, refs: KeyInputs, b: Any, h: Any, t: Any, channels: gpu.Span
) -> tuple[jax.Array, ...]:
    """q, k and log [C, K] of chunk t, float32."""
    key_head = h // (sizes.heads // refs.q.shape[2])
    return tuple(
        gpu.load(ref, b, sizes.tokens(t), head, channels).astype(jnp.float32)
        for ref, head in ((refs.q, key_head), (refs.k, key_head), (refs.log, h))
    )


def channel_scores(sizes: Sizes, inputs: KeyInputs, key_scores: bool) -> ChannelDecay:
    """The scores of all chunks, and queries and keys with their decays.

    key_scores: also the scores of keys with keys, and K_start."""
    C = sizes.chunk
    width, tile_count = gpu.tiling(sizes.key, MAX_WIDTH)

    def kernel(refs: KeyInputs, out: ChannelDecay) -> None:
        matmul = gpu.Matmul(sizes.dtype)
        b, h, t = sizes.program()
        segments = sizes.segments(refs.numbers, b, t)
        row, column = gpu.indices(C, C)
        rows, columns = sizes.padded(t), sizes.columns

        def add_channels(n: Any, sums: Any) -> Any:
            """Adds the scores of the n-th tile of channels, and stores the tile's q, k, total."""
            channels = sizes.channels(n, width, sizes.key)
            q, k, log = _load(sizes, refs, b, h, t, channels)  # [C, K] each

            def add_level(n: Any, sums: Any) -> Any:
                level = _level(n, C)
                earlier = level.pairs & (row > column)
                factor = jnp.exp(matmul.masked_sums(level.mask, log))  # [C, K]  Eq. 1
                x = jnp.where(level.second, q, k) * factor  # [C, K]
                products = [matmul.nt(x, x)]  # [C, C]
                if key_scores:
                    x = k * factor  # [C, K]
                    products.append(matmul.nt(x, x))  # [C, C]
                return [
                    total + jnp.where(earlier, product, 0.0)
                    for total, product in zip(sums, products, strict=True)
                ]

            sums = lax.fori_loop(0, _levels(C), add_level, list(sums))
            sums[0] += jnp.where(row == column, (q * k).sum(1)[:, None], 0.0)
            prefix = jnp.exp(matmul.masked_sums(row >= column, log))  # [C, K]
            suffix = jnp.exp(matmul.masked_sums(row < column, log))  # [C, K]
            total = jnp.exp(log.sum(0))  # [K]
            if segments is not None:
                prefix = jnp.where(segments.reaches_start[:, None], prefix, 0.0)
                suffix = jnp.where(segments.reaches_end[:, None], suffix, 0.0)
                total = jnp.where(segments.continues, total, 0.0)
            gpu.store(out.q_start, sizes.scale * q * prefix, b, h, rows, channels)  # Eq. 2
            gpu.store(out.k_end, k * suffix, b, h, rows, channels)  # Eq. 2
            gpu.store(out.total, total, b, h, t, channels)
            if key_scores:
                gpu.store(out.k_start, k * prefix, b, h, rows, channels)  # Eq. 2
            return sums

        zeros = [gpu.zeros(C, C)] * (2 if key_scores else 1)
        sums = lax.fori_loop(0, tile_count, add_channels, zeros)
        if segments is not None:
            sums = [jnp.where(segments.same, x, 0.0) for x in sums]
        gpu.store(out.scores, sizes.scale * sums[0], b, h, rows, columns)
        if key_scores:
            gpu.store(out.key_scores, sums[1], b, h, rows, columns)

    scores, keys = sizes.rows_shape(C, sizes.dtype), sizes.rows_shape(sizes.key, sizes.dtype)
    return gpu.call(
        "decay_scores",
        kernel,
        (sizes.chunks, sizes.batch * sizes.heads),
        inputs,
        ChannelDecay(
            scores,
            q_start=keys,
            k_end=keys,
            total=sizes.chunks_shape(sizes.key, dtype=jnp.float32),
            key_scores=sizes.rows_shape(C, jnp.float32) if key_scores else None,
            k_start=keys if key_scores else None,
        ),
        warps=4,
        interpret=sizes.interpret,
    )


class _AdjointInputs(NamedTuple):
    inputs: KeyInputs
    cotangents: ChannelDecay


class _InputGradients(NamedTuple):
    """[B, T, H, K] each."""

    dq: Any
    dk: Any
    dlog: Any


def channel_scores_adjoint(
    sizes: Sizes, inputs: KeyInputs, cotangents: ChannelDecay
) -> _InputGradients:
    """The cotangents of q, k (of each value head) and decay_log, from those of the results of
    `channel_scores`."""
    C = sizes.chunk
    width, tile_count = gpu.tiling(sizes.key, MAX_WIDTH)

    def kernel(refs: _AdjointInputs, out: _InputGradients) -> None:
        cotangents, matmul = refs.cotangents, gpu.Matmul(sizes.dtype)
        b, h, x = sizes.program()
        n, t = x % tile_count, x // tile_count
        segments = sizes.segments(refs.inputs.numbers, b, t)
        row, column = gpu.indices(C, C)
        rows, channels = sizes.padded(t), sizes.channels(n, width, sizes.key)
        q, k, log = _load(sizes, refs.inputs, b, h, t, channels)  # [C, K] each

        def load_scores(ref: Any, mask: jax.Array) -> jax.Array:
            """[C, C], zero where the mask is, and between segments."""
            x = gpu.load(ref, b, h, rows, sizes.columns).astype(jnp.float32)
            return jnp.where(mask if segments is None else mask & segments.same, x, 0.0)

        def load_rows(ref: Any, mask: jax.Array | None) -> jax.Array:
            """[C, K], zero in rows where the mask is."""
            x = gpu.load(ref, b, h, rows, channels).astype(jnp.float32)
            return x if mask is None else jnp.where(mask[:, None], x, 0.0)

        dscores = sizes.scale * load_scores(cotangents.scores, row >= column)  # [C, C]
        diagonal = jnp.where(row == column, dscores, 0.0).sum(1)[:, None]  # [C, 1]
        # M of Eq. 3. The diagonal, which the sum takes twice, is in no level.
        pair_gradients = [dscores + dscores.T]  # [C, C]
        if cotangents.key_scores is not None:
            dscores = load_scores(cotangents.key_scores, row > column)  # [C, C]
            pair_gradients.append(dscores + dscores.T)

        reaches_start = None if segments is None else segments.reaches_start
        prefix = jnp.exp(matmul.masked_sums(row >= column, log))  # [C, K]
        dq = sizes.scale * load_rows(cotangents.q_start, reaches_start) * prefix  # [C, K]
        prefix_term = dq * q  # [C, K]
        dk = jnp.zeros_like(dq)
        if cotangents.k_start is not None:
            dk = load_rows(cotangents.k_start, reaches_start) * prefix  # [C, K]
            prefix_term += dk * k
        reaches_end = None if segments is None else segments.reaches_end
        suffix = jnp.exp(matmul.masked_sums(row < column, log))  # [C, K]
        dk_end = load_rows(cotangents.k_end, reaches_end) * suffix  # [C, K]
        total_term = gpu.load(cotangents.total, b, h, t, channels) * jnp.exp(log.sum(0))  # [K]
        if segments is not None:
            total_term = jnp.where(segments.continues, total_term, 0.0)
        dlog = total_term[None, :] + matmul.masked_sums(row <= column, prefix_term)  # [C, K]
        dlog += matmul.masked_sums(row > column, dk_end * k)
        gradients = _InputGradients(dq + diagonal * k, dk + dk_end + diagonal * q, dlog)

        def add_level(n: Any, gradients: _InputGradients) -> _InputGradients:
            return _add_level(matmul, n, q, k, log, pair_gradients, gradients)

        gradients = lax.fori_loop(0, _levels(C), add_level, gradients)
        for ref, gradient in zip(out, gradients, strict=True):
            gpu.store(ref, gradient, b, sizes.tokens(t), h, channels)

    dtypes = (*key_gradient_dtypes(inputs.q, inputs.k, sizes), inputs.log.dtype)
    return gpu.call(
        "decay_scores_adjoint",
        kernel,
        (sizes.chunks * tile_count, sizes.batch * sizes.heads),
        _AdjointInputs(inputs, cotangents),
        _InputGradients(*(sizes.tokens_shape(inputs.log, dtype) for dtype in dtypes)),
        warps=4,
        interpret=sizes.interpret,
    )


def _add_level(
    matmul: gpu.Matmul,
    n: Any,
    q: jax.Array,
    k: jax.Array,
    log: jax.Array,
    pair_gradients: Sequence[jax.Array],
    gradients: _InputGradients,
) -> _InputGradients:
    """The gradients [C, K], with those that come through the scores of the pairs of one level.

    pair_gradients: M [C, C] of the scores of queries with keys, and those of keys with keys."""
    C = q.shape[0]
    dq, dk, dlog = gradients
    level = _level(n, C)
    factor = jnp.exp(matmul.masked_sums(level.mask, log))  # [C, K]  Eq. 1
    x = jnp.where(level.second, q, k) * factor  # [C, K]
    dx = matmul.nn(jnp.where(level.pairs, pair_gradients[0], 0.0), x)  # [C, K]  Eq. 3
    factor_term, dx = x * dx, dx * factor
    dq, dk = (dq + jnp.where(level.second, dx, 0.0), dk + jnp.where(level.second, 0.0, dx))
    for key_gradients in pair_gradients[1:]:
        x = k * factor  # [C, K]
        dx = matmul.nn(jnp.where(level.pairs, key_gradients, 0.0), x)  # [C, K]  Eq. 3
        factor_term += x * dx
        dk += dx * factor
    dlog += matmul.masked_sums(_mirrored_mask(n, C), factor_term)  # Eq. 4
    return _InputGradients(dq, dk, dlog)
