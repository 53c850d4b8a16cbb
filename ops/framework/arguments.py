"""Checks of the arguments of an op: shapes and dtypes while tracing, values where values can be
seen.

Every public op calls these once, in its `api.py`. A violation raises `ValueError` with the name of
the argument, what was expected and what came. Values are visible only in an eager call;
`ops.checks` makes them visible under `jit`."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from .sharding import time_parts

# A real array, or the real and the imaginary part of a complex number.
Number = jax.Array | tuple[jax.Array, jax.Array]

_checking = contextvars.ContextVar("checking", default=False)


def checks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled, with every promise about values that the ops inside make checked on the
    device.

    `ops.checks(step)(...)` raises `jax.experimental.checkify.JaxRuntimeError` naming the argument
    when, say, a `decay_log` is positive or a `beta` lies outside [0, 2]. It costs a reduction per
    checked argument: for debugging, not for training."""
    checked = jax.jit(checkify.checkify(function, errors=checkify.user_checks))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _visible_values():
            error, result = checked(*args, **kwargs)
        error.throw()
        return result

    return wrapper


@contextlib.contextmanager
def _visible_values() -> Iterator[None]:
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def check_shape(
    name: str, array: jax.Array, layout: str, expected: tuple[int | None, ...], like: str = ""
) -> None:
    """Raises ValueError unless `array` has the shape `expected` (None: any size), which the message
    calls `layout`."""
    shape = jnp.shape(array)
    matches = len(shape) == len(expected) and all(
        want in (None, got) for want, got in zip(expected, shape, strict=True)
    )
    if not matches:
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in expected) + ")"
        raise ValueError(f"{name} must be {layout}{like}, expected {wanted}; got {shape}")


def check_float(**arrays: jax.Array | None) -> None:
    """Raises ValueError unless every array that is given is of real floating-point numbers."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(f"{name} must be a floating-point array; got {jnp.result_type(array)}")


def number_parts(
    name: str, number: Number, *, like: tuple[str, tuple[jax.Array, ...]] | None = None
) -> tuple[jax.Array, ...]:
    """The parts (array,) or (real, imaginary) of a number.

    Raises ValueError unless they are of one shape and real floating point, and as many as those of
    `like`, the name and the parts of another number."""
    parts = number if isinstance(number, tuple) else (number,)
    if len(parts) not in ((1, 2) if like is None else (len(like[1]),)):
        wanted = "an array or a pair of arrays"
        if like is not None:
            wanted = f"{'an array' if len(like[1]) == 1 else 'a pair of arrays'} like {like[0]}"
        got = f"a tuple of {len(parts)}" if isinstance(number, tuple) else "an array"
        raise ValueError(f"{name} must be {wanted}; got {got}")
    shapes = [jnp.shape(part) for part in parts]
    for part in parts:
        check_float(**{name: part})
    if shapes[0] != shapes[-1]:
        raise ValueError(f"{name} must have parts of one shape; got {shapes[0]} and {shapes[-1]}")
    return tuple(jnp.asarray(part) for part in parts)


def check_segment_ids(
    segment_ids: jax.Array | None, batch: int, length: int, num_segments: int | None = None
) -> None:
    """Raises ValueError unless `segment_ids` is None or an integer array [B, T]. With
    `num_segments` it must be given, and values that can be seen must be in 0..num_segments-1 and
    never fall along time."""
    if num_segments is not None and (not isinstance(num_segments, int) or num_segments < 1):
        raise ValueError(
            f"num_segments must be None or a Python integer of at least 1; got {num_segments!r}"
        )
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(
                "segment_ids must be [B, T] where num_segments is given"
                f" (num_segments={num_segments}); got None"
            )
        return
    check_shape("segment_ids", segment_ids, "[B, T]", (batch, length))
    if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
        raise ValueError(
            f"segment_ids must be an integer array; got {jnp.result_type(segment_ids)}"
        )
    if num_segments is not None:
        expectation = f"in 0..{num_segments - 1} (num_segments={num_segments})"
        check_values(
            "segment_ids", segment_ids, expectation, lambda x: (x >= 0) & (x < num_segments)
        )
        check_values("segment_ids", segment_ids, "non-decreasing along time", _never_falls)


def _never_falls(x: Any) -> Any:
    """[B, T] bool: whether x is at least its left neighbour on the same device along time."""
    numpy = x.__array_namespace__()
    starts = numpy.arange(x.shape[1]) % (x.shape[1] // time_parts()) == 0
    return (numpy.diff(x, axis=1, prepend=x[:, :1]) >= 0) | starts[None]


def check_values(
    name: str, array: jax.Array | None, expectation: str, predicate: Callable[[Any], Any]
) -> None:
    """Raises ValueError if a value of `array` that can be seen fails `predicate`, which is
    elementwise, of a numpy or a JAX array."""
    if array is None:
        return
    if isinstance(array, Tracer):
        if _checking.get():
            checkify.check(jnp.all(predicate(array)), f"{name} must be {expectation}")
        return
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return  # the values lie on other hosts
    values = np.asarray(array).astype(np.float64)
    good = np.asarray(predicate(values))
    if not good.all():
        index = tuple(int(i) for i in np.argwhere(~good)[0])
        raise ValueError(f"{name} must be {expectation}; got {values[index]} at index {index}")


def finite(x: Any) -> Any:
    """Whether `x` is neither infinite nor NaN, by a comparison that numpy and JAX arrays have."""
    return abs(x) < float("inf")


def check_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, same_length: bool = False) -> None:
    """Raises ValueError unless q is [B, T, H, K], k [B, S, HK, K] and v [B, S, HK, V], of numbers,
    with HK a divisor of H and, with `same_length`, S = T."""
    check_float(q=q, k=k, v=v)
    check_shape("q", q, "[B, T, H, K]", (None,) * 4)
    batch, length, heads, key_size = q.shape
    if 0 in (length, heads, key_size):
        raise ValueError(f"q must be [B, T, H, K] with T, H and K at least 1; got {q.shape}")
    if same_length:
        check_shape("k", k, "[B, T, HK, K]", (batch, length, None, key_size), " with B, T, K of q")
    else:
        check_shape("k", k, "[B, S, HK, K]", (batch, None, None, key_size), " with B and K of q")
    keys, key_heads = k.shape[1:3]
    if keys == 0 or key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"k must be [B, S, HK, K] with S at least 1 and HK a divisor of the {heads} heads of q;"
            f" got {k.shape}"
        )
    check_shape("v", v, "[B, S, HK, V]", (batch, keys, key_heads, None), " with B, S and HK of k")
    if v.shape[3] == 0:
        raise ValueError(f"v must be [B, S, HK, V] with V at least 1; got {v.shape}")


def check_mask(name: str, mask: jax.Array | None, batch: int, length: int) -> None:
    """Raises ValueError unless `mask` is None or a boolean array [B, `length`]."""
    if mask is None:
        return
    check_shape(name, mask, "[B, length]", (batch, length))
    if jnp.result_type(mask) != jnp.bool_:
        raise ValueError(f"{name} must be a boolean array; got {jnp.result_type(mask)}")


def check_number(name: str, value: float, expectation: str, good: Callable[[Any], bool]) -> None:
    """Raises ValueError unless `value` is a Python number, finite, and `good`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and finite(value) and good(value)):
        raise ValueError(f"{name} must be {expectation}; got {value!r}")


def check_matrix_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay_log: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    num_segments: int | None = None,
) -> None:
    """Raises ValueError for what the recurrences with a matrix state [B, H, K, V] refuse in common;
    layouts as in their `api.py`."""
    check_float(q=q, k=k, v=v, decay_log=decay_log, initial_state=initial_state)
    check_shape("q", q, "[B, T, HK, K]", (None,) * 4)
    batch, length, key_heads, key_size = q.shape
    if 0 in (length, key_heads, key_size):
        raise ValueError(f"q must be [B, T, HK, K] with T, HK and K at least 1; got {q.shape}")
    check_shape("k", k, "[B, T, HK, K]", q.shape, like=" like q")
    check_shape("v", v, "[B, T, H, V]", (batch, length, None, None), like=" with B and T of q")
    heads, value_size = v.shape[2:]
    if 0 in (heads, value_size) or heads % key_heads:
        raise ValueError(
            "v must be [B, T, H, V] with V at least 1 and H a multiple of the"
            f" {key_heads} heads of q; got {v.shape}"
        )
    if decay_log is not None:
        layouts = {
            1: ("[H]", (heads,)),
            3: ("[B, T, H]", (batch, length, heads)),
            4: ("[B, T, H, K]", (batch, length, heads, key_size)),
        }
        if decay_log.ndim not in layouts:
            raise ValueError(
                f"decay_log must be None, [H], [B, T, H] or [B, T, H, K]; got {decay_log.shape}"
            )
        check_shape("decay_log", decay_log, *layouts[decay_log.ndim])
        check_values("decay_log", decay_log, "finite and <= 0", lambda x: (x <= 0) & finite(x))
    check_segment_ids(segment_ids, batch, length, num_segments)
    if initial_state is not None:
        state = (heads, key_size, value_size)
        if num_segments is None:
            layout, shape = "[B, H, K, V]", (batch, *state)
        else:
            layout, shape = "[B, num_segments, H, K, V]", (batch, num_segments, *state)
        check_shape("initial_state", initial_state, layout, shape)
