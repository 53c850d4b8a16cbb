"""What the GPU kernels of elementwise recurrences share: channels side by side, time in parts,
states between them.

**Programs.** A program is one warp (more for large states), walks over time and holds the states of
`lanes` channels in registers. What all channels of a token need is loaded by every program; the
threads of a warp lie along channels first, along states with what is left. Tokens come in turns of
a few; those of the next turn are loaded before the work of this one, since nothing else hides the
way to memory.

**Time in parts.** Where batch and channels give too few warps, time is cut into parts. A first
kernel computes of each part what it adds to the state and the product of its factors; the states
between parts follow in plain JAX, and the kernel proper runs on all parts at once.

**No masks.** Channels are padded to whole programs, outputs to whole turns of tokens. A token past
the end is read from the last one and changed to one that leaves the state alone."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..framework import segments
from . import tiles as gpu

# Programs of one warp that count as one of `gpu.FILLING_PROGRAMS`, of four: three, so that 1024
# fill. Not measured.
WARPS = 3
MAX_BATCH = 65535  # the second dimension of a grid
LANES = 16  # channels of a tile: fewer values than threads load without an exchange between threads
CHUNK = 64  # tokens between states that a backward pass makes anew; of it parts of time are made


def lanes(batch: int, channels: int, states: int) -> int:
    """Channels of a tile: 16, or 8 where only so the programs fill a GPU, or the states
    registers."""
    programs = batch * pl.cdiv(channels, LANES)
    many = programs >= WARPS * gpu.FILLING_PROGRAMS
    return LANES if many and states <= 32 else LANES // 2


def parts(length: int, programs: int) -> int:
    """In how many parts of whole chunks to cut time where `programs` warps run without."""
    return gpu.split_time(pl.cdiv(length, CHUNK), max(1, programs // WARPS))


def keep_states(segment_ids: jax.Array | None) -> jax.Array | None:
    """`segments.continues` as the int32 that kernels load."""
    keep = segments.continues(segment_ids)
    return None if keep is None else keep.astype(jnp.int32)


def pad_last(x: jax.Array, size: int) -> jax.Array:
    """x with zeros up to `size` along its last axis."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x


def round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def barrier(interpret: bool) -> None:
    """Of the threads of a program: what one has written to memory, others read."""
    if not interpret:
        gpu.triton().debug_barrier()


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2^x by one instruction, which flushes results below 2^-126 to zero."""
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


def kept(state: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The state, or zero where a token starts a segment: chosen, because a state may be
    infinite."""
    return state if keep is None else jnp.where(keep != 0, state, 0.0)
