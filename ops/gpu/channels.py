"""What the GPU kernels of elementwise recurrences share: channels side by side, tokens one after
another, time in parts.

**Programs.** A program is one warp (more for large states), walks over time and holds the states of
a tile of channels in registers. What all channels of a token need is loaded by every program. The
threads of a warp lie along channels first, and along states where threads remain. The tokens of the
next turn are loaded before the work on this one, since nothing else hides the latency of memory.

**No masks.** Channels are padded to whole programs, outputs to whole turns of tokens. For a token
past the end a program reads the last one and changes it to one that leaves the state alone."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..framework import segments
from . import tiles as gpu

# Programs of one warp that count as one of `gpu.FILLING_PROGRAMS`, which have four: three, so that
# 1024 programs do without parts. Not measured.
WARPS = 3
MAX_BATCH = 65535  # NOTE: the limit of the second dimension of a grid
LANES = 16  # channels of a tile: fewer values than threads load without an exchange between threads
CHUNK = 64  # tokens between the states that are kept for the backward pass; parts are whole chunks


def lanes(batch: int, channels: int, states: int) -> int:
    """Channels of a tile: 16, or 8 where 16 give too few programs to fill a GPU or where the states
    of 16 would not fit registers."""
    programs = batch * pl.cdiv(channels, LANES)
    many = programs >= WARPS * gpu.FILLING_PROGRAMS
    return LANES if many and states <= 32 else LANES // 2


def part_count(length: int, programs: int) -> int:
    """The number of parts of time; programs: how many warps there are for each part."""
    return gpu.split_time(pl.cdiv(length, CHUNK), max(1, programs // WARPS))


def keep_of(segment_ids: jax.Array | None, reverse: bool) -> jax.Array | None:
    """keep [B, T] as the int32 that kernels load; None: one segment."""
    keep = segments.continues(segment_ids, reverse=reverse)
    return None if keep is None else keep.astype(jnp.int32)


def pad_last(x: jax.Array, size: int) -> jax.Array:
    """x with zeros up to `size` along its last axis."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return pl.cdiv(size, multiple) * multiple


def barrier(interpret: bool) -> None:
    """Makes what one thread of a program has written to memory visible to the others."""
    if not interpret:
        gpu.triton().debug_barrier()


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2^x, below 2^-126 zero, by one instruction."""
    if interpret:
        return jnp.exp2(x)
    (result,) = gpu.triton().elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def reset(state: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The state, or zero where a token starts a segment: chosen, because a state may be
    infinite."""
    return state if keep is None else jnp.where(keep != 0, state, 0.0)
