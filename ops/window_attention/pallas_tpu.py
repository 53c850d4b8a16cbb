"""Window attention on TPU by JAX's own kernel, splash attention: blocks of keys that no query of a
block sees are never fetched, and logits stay in fast memory.

The kernel takes a multiple of 128 tokens, and queries that are scaled before, which rounds them
again where the scale is no power of two. Padded keys are in no segment; the outputs of padded
queries are cut off. The backward pass runs from the inputs: the forward kernel runs again for the
sums of the softmax.
(Dao, FlashAttention-2, 2023, arXiv 2307.08691; `jax.experimental.pallas.ops.tpu.splash_attention`.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ..tpu.kernel import LANES
from .xla import join, last_state

# Tokens per block of queries and of keys; wide blocks fetch less, narrow ones waste less of a
# narrow window.
LARGEST_BLOCK = 512
SUPPORTED = "softmax, and bfloat16 q, k and v of at least 128 tokens, on a TPU"


def supports(q, k, v, *_, activation, **__) -> bool:
    """Whether the kernel serves these inputs: it rounds the factors of its products to bfloat16,
    which would lose bits of float32 inputs, and few queries do not fill it."""
    return (
        activation == "softmax"
        and q.shape[1] >= LANES
        and all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    )


def _block(tokens: int, window: int) -> int:
    """Tokens of a block: the largest power of two from 128 to `LARGEST_BLOCK` that divides `tokens`
    and is narrower than two windows."""
    block = LARGEST_BLOCK
    while block > LANES and (tokens % block or block >= 2 * window):
        block //= 2
    return block


def _attend(q, k, v, q_runs, k_runs, *, window, scale, interpret):
    """o [B, T, H, V] of q [B, T, H, K] at the end of S keys and values."""
    batch, length, heads, _ = q.shape
    before, key_heads = k.shape[1] - length, k.shape[2]

    def padded(x, fill=0):
        after = ((0, 0), (0, -x.shape[1] % LANES), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, after, constant_values=fill)

    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (padded(x) for x in (q, k, v))
    ids = splash.SegmentIds(padded(q_runs, -1), padded(k_runs, -1))
    rows, columns = q.shape[1], k.shape[1]
    of_queries, of_keys = _block(rows, window), _block(columns, window)
    mask = masks.LocalMask((rows, columns), (window - 1, 0), before)
    attend = splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * (heads // key_heads)),
        block_sizes=splash.BlockSizes(
            block_q=of_queries,
            block_kv=of_keys,
            block_q_dkv=of_queries,
            block_kv_dkv=of_keys,
            block_q_dq=of_queries,
            block_kv_dq=of_keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # [B, HK, H / HK, T, K] against [B, HK, S, K].
    q = q.reshape(batch, rows, key_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    of_one_sequence = jax.vmap(attend, in_axes=(0, 0, 0, None))
    o: Any = jax.vmap(of_one_sequence)(q, k, v, ids)
    return o.transpose(0, 3, 1, 2, 4).reshape(batch, rows, heads, -1)[:, :length]


def _outputs(q, k, v, k_past, v_past, valid_past, segment_ids, *, window, scale, interpret):
    joined = join(k, v, k_past, v_past, valid_past, segment_ids, window)
    k, v, k_runs = (x[:, joined.first :] for x in joined[:3])
    q_runs = joined.runs[:, window - 1 :]
    o = _attend(q, k, v, q_runs, k_runs, window=window, scale=scale, interpret=interpret)
    return o, *last_state(joined, q.shape[1])


def _gradients(inputs, cotangents, **options):
    *arrays, valid_past, segment_ids = inputs

    def outputs(q, k, v, k_past, v_past):
        return _outputs(q, k, v, k_past, v_past, valid_past, segment_ids, **options)[:3]

    _, pullback = jax.vjp(outputs, *arrays)
    return pullback(cotangents)


def forward(
    q, k, v, k_past, v_past, valid_past, segment_ids, *, window, scale, activation, interpret=False
):
    """o in v's dtype and the parts of the final state; shapes as in `api.py`, the initial state by
    its parts or three times None."""
    del activation
    inputs = (q, k, v, k_past, v_past, valid_past, segment_ids)
    return _outputs(*inputs, window=window, scale=scale, interpret=interpret)


def backward(
    q,
    k,
    v,
    k_past,
    v_past,
    valid_past,
    segment_ids,
    do,
    dk_last,
    dv_last,
    *,
    window,
    scale,
    activation,
    interpret=False,
):
    """Gradients of q, k, v, k_past and v_past (None without initial state), and None for
    valid_past."""
    del activation
    inputs = (q, k, v, k_past, v_past, valid_past, segment_ids)
    cotangents = (do.astype(q.dtype), dk_last, dv_last)
    gradients = _gradients(inputs, cotangents, window=window, scale=scale, interpret=interpret)
    return *gradients, None
