"""Ring attention: queries stay on their device, keys and values visit all devices one after
another.

With x_ts the logits of query t, every device that the keys visit updates

    m' = max(m, max_s x_ts)                                                                    (1)
    l' = l e^(m - m') + sum_s e^(x_ts - m')                                                    (2)
    o' = o e^(m - m') + sum_s e^(x_ts - m') v_s                                                (3)

over the tokens s of these keys, from the device's own to those of the first device. The output is
o / l. The log sum m + log l is kept for the backward pass, in which the gradients of keys and
values travel with them, until they are at home:

    p_ts = e^(x_ts - log sum)       dx_ts = scale p_ts (do_t . v_s - do_t . o_t)               (4)
    dq_t = sum_s dx_ts k_s          dk_s  = sum_t dx_ts q_t        dv_s = sum_t p_ts do_t      (5)

(Liu, Zaharia, Abbeel, Ring Attention with Blockwise Transformers, ICLR 2024, arXiv 2310.01889.)

Blocks of queries take turns, so that no more logits exist at a time than those of one block with
the keys of one device. Letters as in `xla.py`: M key heads, R = H / M query heads per key head; n
tokens per device. `runs` are the numbers of segments, counted over all devices."""

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
    """What travels: keys and values [B, n, M, K or V], the number of each token's segment [B, n],
    and the rank of their device."""

    k: jax.Array
    v: jax.Array
    runs: jax.Array
    device: jax.Array


def _onward(values: Any, axis: TimeAxis) -> Any:
    """What the device before holds; on the first what the last holds."""
    pairs = [(r, (r + 1) % axis.size) for r in range(axis.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), values)


def _held_together(q, k, v, runs, axis: TimeAxis):
    """q, and what travels, tied to q.

    Otherwise the masks would not depend on q, and differentiation would compute them on their own,
    of all blocks and all devices at once."""
    return lax.optimization_barrier((q, _Keys(k, v, runs, axis.rank)))


def _logits(q, number, q_runs, rank, keys: _Keys, window, scale):
    """Logits [B, M, R, C, n] of the block of queries `number`, and whether each counts."""
    block, length = q.shape[1], keys.k.shape[1]
    t = rank * length + number * block + jnp.arange(block)
    s = keys.device * length + jnp.arange(length)
    distance = t[:, None] - s[None, :]
    near = (distance >= 0) & (distance < window)
    sees = near[None] & (q_runs[:, :, None] == keys.runs[:, None, :])
    x = scale * einsum("bcmrk,bsmk->bmrcs", q, keys.k.astype(jnp.float32))
    return x, sees[:, None, None]


def _visible(rank, keys: _Keys, window) -> jax.Array:
    """Whether a query of this device can see one of the keys."""
    length = keys.k.shape[1]
    apart = (rank - keys.device) * length  # of the first tokens
    return (apart >= 0) & (apart - (length - 1) < window)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[G, B, C, ...] of [B, n, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """[B, n, ...] of [G, B, C, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _round(axis: TimeAxis, visit: Callable[[Any, Any], Any], mine: Any, travelling: Any):
    """What `visit(mine, travelling) -> both` leaves when what travels has visited every device; it
    is one step from home then."""
    mine, travelling = visit(mine, travelling)

    def step(carry, _):
        mine, travelling = carry
        return visit(mine, _onward(travelling, axis)), None

    (mine, travelling), _ = lax.scan(step, (mine, travelling), None, length=axis.size - 1)
    return mine, travelling


def _grouped(x, key_heads):
    """[B, n, M, R, X] in float32 of [B, n, H, X]."""
    return x.astype(jnp.float32).reshape(*x.shape[:2], key_heads, -1, x.shape[-1])


def _block(length: int) -> int:
    """The largest divisor of n up to QUERIES."""
    return max(c for c in range(1, min(length, QUERIES) + 1) if length % c == 0)


def forward(axis: TimeAxis, q, k, v, runs, *, window, scale):
    """o [B, n, H, V] and the log sums [B, n, M, R], in float32; runs [B, n]."""
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
                top = jnp.maximum(m, x.max(-1))  # Eq. 1
                p = jnp.where(sees, jnp.exp(x - top[..., None]), 0.0)
                faded = jnp.exp(m - top)
                # Eq. 3 and 2
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
    """Gradients of q, k and v in float32."""
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
                # Eq. 4
                p = jnp.where(sees, jnp.exp(x - log_sum), 0.0)
                dp = einsum("bcmrv,bsmv->bmrcs", do, keys.v.astype(jnp.float32))
                dx = scale * p * (dp - correction)
                # Eq. 5
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
