"""How heads of any size fit the fast memory: what the blocks of a kernel need is known before it is
called, and columns are padded or values cut in parts until it is there.

A tile's lanes are a multiple of 128 or everything, so heads of odd sizes may all have to be in one
grid step, and one head of 1024 x 2048 numbers fills the memory alone. `choose` takes the first that
fits of

- the heads as they are;
- keys and values with zeros at the end, so that fewer heads are whole lanes; zeros change nothing
  in the other columns;
- besides, values in parts. The columns of a state do not see each other: a part of a head's values
  is a head of its own that shares keys, decays and beta with the others, as value heads share key
  heads. Gradients of what is shared are sums over the parts.

A rule is written for heads that fit, and `fitted` makes it one for all by the layouts of its
arguments and results, in the letters of `ops/framework/sharding.py`: B batch, T time, G key heads,
H heads, K key, V value, "decay" for a log decay of any rank, "state" for one state per sequence or,
with `num_segments`, per segment."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import heads
from .heads import HeadGrid, Tuning
from .kernel import LANES, SUBLANES, VMEM_BYTES
from .matmul import matmul_dtype

SUPPORTED = f"heads of which one, with {LANES} value columns, fits {VMEM_BYTES >> 20} MiB"
# Values of one head that are alive at once: so many arrays of [C, K], [C, V] and [C, C] each (with
# a decay per channel more, see `Tuning`). Bounds of what libtpu 0.0.42.1 and 0.0.51 take for the
# backward kernels, in the dtype of products: heads of 16 x 24 to 1024 x 2048, v5e, v5p and v6e.
LIVE_ARRAYS = 16
# And so many bytes for each number of a state, by the bytes of a factor of products: those of
# float32 enter in three terms.
BYTES_OF_STATES = {2: 4, 4: 44}


@dataclass(frozen=True)
class Fit:
    """key_size, value_size: columns that a kernel's head has; parts: heads that one head becomes,
    along its values."""

    key_size: int
    value_size: int
    parts: int

    def given(self, x: Any, letters: str) -> Any:
        """An argument as the kernel takes it."""
        if x is None:
            return None
        if "K" in letters:
            x = _padded(x, letters, "K", self.key_size)
        if "V" in letters:
            x = _padded(x, letters, "V", self.parts * self.value_size)
        if self.parts == 1 or "H" not in letters:
            return x
        axis = letters.index("H")
        if "V" not in letters:
            return jnp.repeat(x, self.parts, axis)
        x = x.reshape(*x.shape[:-1], self.parts, self.value_size)
        x = jnp.moveaxis(x, -2, axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def taken(self, x: Any, letters: str, like: dict[str, int]) -> Any:
        """A result, or the gradient of an argument, from what the kernel made of `given`; like: the
        sizes of letters."""
        if x is None:
            return None
        if "H" in letters and self.parts > 1:
            axis = letters.index("H")
            x = x.reshape(*x.shape[:axis], -1, self.parts, *x.shape[axis + 1 :])
            if "V" in letters:
                x = jnp.moveaxis(x, axis + 1, -2)
                x = x.reshape(*x.shape[:-2], -1)
            else:
                x = x.astype(jnp.float32).sum(axis + 1)
        return x[tuple(slice(like[letter]) for letter in letters)]


def choose(q: Any, v: Any, decay_log: Any, tuning: Tuning) -> Fit | None:
    """What makes heads of q [B, T, HK, K] and v [B, T, H, V] fit; None if nothing does."""
    for fit in _candidates(q, v, tuning):
        if needed_bytes(grid_of(q, v, fit, tuning), q, v, decay_log, tuning) <= VMEM_BYTES:
            return fit
    return None


def grid_of(q: Any, v: Any, fit: Fit, tuning: Tuning) -> HeadGrid:
    """The grid of heads that were made to fit so."""
    of_parts = *v.shape[:2], v.shape[2] * fit.parts, fit.value_size
    return heads.cut(
        jax.ShapeDtypeStruct((*q.shape[:3], fit.key_size), q.dtype),
        jax.ShapeDtypeStruct(of_parts, v.dtype),
        tuning,
        reverse=False,
        interpret=False,
    )


def needed_bytes(grid: HeadGrid, q: Any, v: Any, decay_log: Any, tuning: Tuning) -> int:
    """At most what a backward kernel has in fast memory: tiles twice, while the next ones come; the
    carry; what its heads compute."""
    C, K, V, count = grid.chunk, grid.key_size, grid.value_size, grid.heads
    channels = decay_log if decay_log is not None and decay_log.ndim == 4 else None
    shared = grid.steps_per_key_head > 1  # gradients of keys are float32 then
    key_bytes, value_bytes, product_bytes = (
        jnp.dtype(x).itemsize for x in (q.dtype, v.dtype, matmul_dtype(q, v))
    )
    keys = _tile_bytes(C, grid.key_heads * K, 2 * key_bytes + 2 * (4 if shared else key_bytes))
    values = _tile_bytes(C, count * V, 3 * value_bytes)
    decays = 0
    if channels is not None:
        # Log decays and their gradients; 0/1 matrices of the intervals and of the levels.
        decays = _tile_bytes(C, count * K, 2 * channels.dtype.itemsize) + 40 * C * C * 4
    # At the chunk's start; of the last state and the first one's gradient, the other way around.
    states = count * (_tile_bytes(V, K, 4) + 2 * _tile_bytes(K, V, 4))
    carry = count * _tile_bytes(V, K, 4)
    wide_K, wide_V, wide_C = (-(-x // LANES) * LANES for x in (K, V, C))
    live = LIVE_ARRAYS * (wide_K + wide_V + wide_C)
    if channels is not None:
        live += tuning.live_of_channels * wide_K
    live_states = count * _tile_bytes(V, K, BYTES_OF_STATES[product_bytes])
    tiles = 2 * (keys + values + decays + states)
    return tiles + carry + live_states + count * C * live * product_bytes


def fitted(arguments: str, results: str, tuning: Tuning) -> Callable[[Any], Any]:
    """A decorator of a kernel's rule: its arguments and results have these layouts, and come and go
    in the sizes of the caller's heads."""

    def decorator(rule: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(rule)
        def run(*args: Any, **static: Any) -> tuple[Any, ...]:
            named = dict(zip(reversed(arguments.split()), reversed(args), strict=True))
            q, v, decay_log = (named[layout] for layout in ("BTGK", "BTHV", "decay"))
            fit = choose(q, v, decay_log, tuning)
            assert fit is not None, "`supports` was not asked"
            segments = static.get("num_segments")
            letters = {
                "decay": _of_decay(decay_log),
                "state": "BHKV" if segments is None else "BSHKV",
            }
            layouts, outputs = (
                [letters.get(x, x) for x in text.split()] for text in (arguments, results)
            )
            sizes = dict(zip("BTGK", q.shape, strict=True)) | dict(
                zip("BTHV", v.shape, strict=True), S=segments
            )
            given = [fit.given(x, to) for x, to in zip(args, layouts, strict=True)]
            made = rule(*given, **static)
            return tuple(fit.taken(x, to, sizes) for x, to in zip(made, outputs, strict=True))

        return run

    return decorator


def _candidates(q: Any, v: Any, tuning: Tuning) -> Iterator[Fit]:
    key_size, value_size = q.shape[3], v.shape[3]
    yield Fit(key_size, value_size, parts=1)
    parts = 1
    while True:
        yield _whole_lanes(q, v, parts, tuning)
        parts *= 2
        if value_size <= LANES * parts // 2:
            return


def _whole_lanes(q: Any, v: Any, parts: int, tuning: Tuning) -> Fit:
    """The fit of as many heads a step as `tuning.lanes` allow, with zeros that make them whole
    lanes."""
    (key_heads, key_size), (count, value_size) = q.shape[2:], v.shape[2:]
    count, value_size = count * parts, -(-value_size // parts)
    group = count // key_heads

    def padded(step: int) -> Fit:
        of_keys, of_values = (LANES // math.gcd(n, LANES) for n in (max(1, step // group), step))
        return Fit(
            -(-key_size // of_keys) * of_keys, -(-value_size // of_values) * of_values, parts
        )

    steps = [
        n for n in range(1, count + 1) if count % n == 0 and (n % group == 0 or group % n == 0)
    ]
    fits = [padded(n) for n in steps]
    small = [
        fit
        for n, fit in zip(steps, fits, strict=True)
        if n * max(fit.key_size, fit.value_size) <= tuning.lanes
    ]
    return small[-1] if small else fits[0]


def _of_decay(decay_log: Any) -> str:
    return {None: "", 1: "H", 3: "BTH", 4: "BTHK"}[None if decay_log is None else decay_log.ndim]


def _padded(x: jax.Array, letters: str, letter: str, size: int) -> jax.Array:
    axis = letters.index(letter)
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def _tile_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Of an array in fast memory, whose last two sizes are whole registers."""
    return -(-rows // SUBLANES) * SUBLANES * -(-columns // LANES) * LANES * itemsize
