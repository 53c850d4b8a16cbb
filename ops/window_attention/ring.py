"""Ring attention: queries stay on their device, keys and values visit all devices one after
another.

    m' = max(m, max_s x_ts)     l' = l e^(m - m') + sum_s e^(x_ts - m')     o' = o e^(m - m') +
    sum_s e^(x_ts - m') v_s

over the logits x of the tokens s that are there, from the device's own tokens to those of the first
device; then o / l, and m + log l is kept for the backward pass, in which the gradients of keys and
values travel with them and end where they belong. (Liu, Zaharia, Abbeel, Ring Attention with
Blockwise Transformers, ICLR 2024, arXiv 2310.01889.)

Blocks of queries take turns, so that the logits of one block with one device's keys are all there
is. Letters as in `xla.py`, R = H / M query heads per key head; n tokens per device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..chunks.chunking import einsum
from ..framework.sequence_parallel import TimeAxis
from ..framework.sharding import SEQUENCE

QUERIES = 512  # per block
LOWEST = float(jnp.finfo(jnp.float32).min)


class _Keys(NamedTuple):
    """What travels: keys and values [B, n, M, K | V], the run of each token [B, n], and the number
    of its device."""

    k: jax.Array
    v: jax.Array
    runs: jax.Array
    device: jax.Array


def _onward(values: Any, axis: TimeAxis) -> Any:
    """From each device to the next, from the last to the first."""
    pairs = [(r, (r + 1) % axis.size) for r in range(axis.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), values)


def _held_together(q, k, v, runs, axis: TimeAxis):
    """q, and what travels.

    Tied to q, so that no part of the masks is known without it: differentiation would compute the
    known part on its own, the masks of all blocks and all devices at once."""
    return lax.optimization_barrier((q, _Keys(k, v, runs, axis.rank)))


def _logits(q, number, q_runs, rank, keys: _Keys, window, scale):
    """Logits [B, M, R, C, n] of the block of queries `number`, and which of them count."""
    block, length = q.shape[1], keys.k.shape[1]
    t = rank * length + number * block + jnp.arange(block)
    s = keys.device * length + jnp.arange(length)
    distance = t[:, None] - s[None, :]
    near = (distance >= 0) & (distance < window)
    sees = near[None] & (q_runs[:, :, None] == keys.runs[:, None, :])
    x = scale * einsum("bcmrk,bsmk->bmrcs", q, keys.k.astype(jnp.float32))
    return x, sees[:, None, None]


def _visible(rank, keys: _Keys, window) -> jax.Array:
    """Whether any query of this device can see any of the keys."""
    length = keys.k.shape[1]
    apart = (rank - keys.device) * length  # of the first tokens
    return (apart >= 0) & (apart - (length - 1) < window)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[B, n, ...] -> [G, B, C, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """[G, B, C, ...] -> [B, n, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _round(axis: TimeAxis, visit: Callable[[Any, Any], Any], mine: Any, travelling: Any):
    """visit(mine, travelling) -> both, with what each device holds in turn; one step from home at
    the end."""
    mine, travelling = visit(mine, travelling)

    def step(carry, _):
        mine, travelling = carry
        return visit(mine, _onward(travelling, axis)), None

    (mine, travelling), _ = lax.scan(step, (mine, travelling), None, length=axis.size - 1)
    return mine, travelling


def _grouped(x, key_heads):
    """[B, n, H, X] -> [B, n, M, R, X] in float32."""
    return x.astype(jnp.float32).reshape(*x.shape[:2], key_heads, -1, x.shape[-1])


def _block(length: int) -> int:
    """The largest divisor of n up to QUERIES."""
    return max(c for c in range(1, min(length, QUERIES) + 1) if length % c == 0)


def forward(axis: TimeAxis, q, k, v, runs, *, window, scale):
    """o [B, n, H, V] and the log sums of exponentials [B, n, M, R], float32; runs [B, n] count over
    all devices."""
    batch, length, heads, _ = q.shape
    key_heads, block = k.shape[2], _block(length)
    q, own = _held_together(q, k, v, runs, axis)
    numbers = jnp.arange(length // block)
    q_blocks, runs_blocks = _cut(_grouped(q, key_heads), block), _cut(own.runs, block)

    def visit(sums, keys):
        def update(sums):
            def one(inputs):
                number, q, q_runs, m, l, o = inputs
                x, sees = _logits(q, number, q_runs, own.device, keys, window, scale)
                x = jnp.where(sees, x, LOWEST)
                top = jnp.maximum(m, x.max(-1))
                p = jnp.where(sees, jnp.exp(x - top[..., None]), 0.0)
                faded = jnp.exp(m - top)
                o = o * faded[..., None] + einsum(
                    "bmrcs,bsmv->bmrcv", p, keys.v.astype(jnp.float32)
                )
                return top, l * faded + p.sum(-1), o

            return lax.map(one, (numbers, q_blocks, runs_blocks, *sums))

        visible = _visible(own.device, keys, window)
        return lax.cond(visible, update, lambda s: s, sums), keys

    shape = (length // block, batch, key_heads, heads // key_heads, block)
    nothing = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1])))
    (m, l, o), _ = _round(axis, visit, nothing, own)
    o, log_sum = o / l[..., None], m + jnp.log(l)
    # [G, B, M, R, C, ...] -> [B, n, M, R, ...]
    o, log_sum = (_joined(jnp.moveaxis(x, 4, 2)) for x in (o, log_sum))
    return o.reshape(batch, length, heads, -1), log_sum


def backward(axis: TimeAxis, q, k, v, runs, o, log_sum, do, *, window, scale):
    """Cotangents of q, k and v in float32."""
    length, key_heads = k.shape[1:3]
    block = _block(length)
    q, own = _held_together(q, k, v, runs, axis)
    do = _grouped(do, key_heads)
    correction = jnp.sum(do * _grouped(o, key_heads), axis=-1)
    blocks = (
        jnp.arange(length // block),
        *(_cut(x, block) for x in (_grouped(q, key_heads), own.runs, log_sum, do, correction)),
    )

    def visit(dq, travelling):
        keys, dk, dv = travelling

        def update(dq, dk, dv):
            def one(sums, inputs):
                (dk, dv), (number, q, q_runs, log_sum, do, correction, dq) = (sums, inputs)
                x, sees = _logits(q, number, q_runs, own.device, keys, window, scale)
                # [B, C, M, R] -> [B, M, R, C, 1]
                log_sum, correction = (
                    jnp.moveaxis(y, 1, 3)[..., None] for y in (log_sum, correction)
                )
                p = jnp.where(sees, jnp.exp(x - log_sum), 0.0)
                dp = einsum("bcmrv,bsmv->bmrcs", do, keys.v.astype(jnp.float32))
                dx = scale * p * (dp - correction)
                dq += einsum("bmrcs,bsmk->bcmrk", dx, keys.k.astype(jnp.float32))
                dk += einsum("bmrcs,bcmrk->bsmk", dx, q)
                dv += einsum("bmrcs,bcmrv->bsmv", p, do)
                return (dk, dv), dq

            (dk, dv), dq = lax.scan(one, (dk, dv), (*blocks, dq))
            return dq, dk, dv

        dq, dk, dv = lax.cond(
            _visible(own.device, keys, window), update, lambda *unchanged: unchanged, *(dq, dk, dv)
        )
        return dq, (keys, dk, dv)

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    travelling = (own, *zeros)
    dq, (_, dk, dv) = _round(axis, visit, jnp.zeros_like(blocks[1]), travelling)
    dk, dv = _onward((dk, dv), axis)  # the last step, home
    return _joined(dq).reshape(q.shape), dk, dv
