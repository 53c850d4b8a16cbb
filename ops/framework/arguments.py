"""Checks of the arguments of an op: shapes and dtypes while tracing, values where values can be
seen.

Every public op calls these once, in its `api.py`. A violation raises `ValueError` with the name of
the argument, what was expected and what came. Values are visible only in an eager call;
`ops.checks` makes them visible under `jit`."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def floats(**arrays: Any) -> tuple[Any, ...]:
    """The arguments as JAX arrays, None for None.

    Raises ValueError unless each that is given is an array of real floating-point numbers."""
    return tuple(
        None if array is None else _typed(name, array, jnp.floating, "a floating-point array")
        for name, array in arrays.items()
    )


def _typed(name: str, array: Any, kind: Any, expectation: str) -> jax.Array:
    """The argument as a JAX array of this kind of dtype."""
    if not isinstance(array, jax.Array | np.ndarray | np.generic):
        raise ValueError(f"{name} must be {expectation}; got a {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} must be {expectation}; got {array.dtype}")
    return jnp.asarray(array)


def integer(name: str, value: Any, least: int, meaning: str = "") -> int:
    """The argument as a Python integer.

    Raises ValueError unless it is an integer of Python or numpy, and `least` or more; meaning: what
    the message adds to that."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(f"{name} must be an integer >= {least}{meaning}; got {value!r}")
    return int(value)


def number(
    name: str, value: Any, expectation: str, good: Callable[[float], bool] = lambda value: True
) -> float:
    """The argument as a Python float.

    Raises ValueError unless it is a finite real number whose value is known while tracing, and
    `good`."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be known while tracing, it is part of the program; got {value.aval}:"
            " multiply an argument by what is traced"
        )
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    is_number &= not isinstance(value, bool) and not np.ndim(value)
    if not (is_number and np.isfinite(value) and good(value)):
        raise ValueError(f"{name} must be {expectation}; got {value!r}")
    return float(value)


def scale_of(scale: Any, key_size: int) -> float:
    """The factor on q: K**-0.5 for None."""
    return key_size**-0.5 if scale is None else number("scale", scale, "None or a finite number")


def flag(name: str, value: Any) -> bool:
    """The argument as a Python bool. Raises ValueError unless it is one, or numpy's."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The argument. Raises ValueError unless it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def integer_array(name: str, array: Any, layout: str, shape: tuple[int, ...]) -> Any:
    """The argument as a JAX array, None for None. Raises ValueError unless it is None or an
    integer array of this shape."""
    if array is None:
        return None
    array = _typed(name, array, jnp.integer, "an integer array")
    check_shape(name, array, layout, shape)
    return array


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
    arrays = tuple(floats(**{name: part})[0] for part in parts)
    if arrays[0].shape != arrays[-1].shape:
        raise ValueError(
            f"{name} must have parts of one shape; got {arrays[0].shape} and {arrays[-1].shape}"
        )
    return arrays


def checked_segment_ids(
    segment_ids: Any, batch: int, length: int, num_segments: int | None = None
) -> jax.Array | None:
    """`segment_ids` as a JAX array, None for None.

    Raises ValueError unless it is None or an integer array [B, T]. With `num_segments` it must be
    given, and values that can be seen must be in 0..num_segments-1 and never fall along time."""
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(
                "segment_ids must be [B, T] where num_segments is given"
                f" (num_segments={num_segments}); got None"
            )
        return None
    segment_ids = _typed("segment_ids", segment_ids, jnp.integer, "an integer array")
    check_shape("segment_ids", segment_ids, "[B, T]", (batch, length))
    if num_segments is not None:
        expectation = f"in 0..{num_segments - 1} (num_segments={num_segments})"
        check_values(
            "segment_ids", segment_ids, expectation, lambda x: (x >= 0) & (x < num_segments)
        )
        check_values("segment_ids", segment_ids, "non-decreasing along time", _never_falls)
    return segment_ids


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


def check_finite(segment_ids: jax.Array | None, **outputs: jax.Array) -> None:
    """Under `ops.checks`, an error for an output that is not finite beside segments, which others
    than its own may have caught it from."""
    if segment_ids is None or not _checking.get():
        return
    for name, output in outputs.items():
        check_values(name, output, "finite where segment_ids are given", finite)


def finite(x: Any) -> Any:
    """Whether `x` is neither infinite nor NaN, by a comparison that numpy and JAX arrays have."""
    return abs(x) < float("inf")


def attention_arrays(
    q: Any, k: Any, v: Any, *, same_length: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v as JAX arrays.

    Raises ValueError unless q is [B, T, H, K], k [B, S, HK, K] and v [B, S, HK, V], of floats, with
    HK a divisor of H and, with `same_length`, S = T."""
    q, k, v = floats(q=q, k=k, v=v)
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
    return q, k, v


def mask_array(name: str, mask: Any, batch: int, length: int) -> jax.Array | None:
    """The mask as a JAX array, None for None. Raises ValueError unless it is None or a boolean
    array [B, `length`]."""
    if mask is None:
        return None
    mask = _typed(name, mask, np.bool_, "a boolean array")
    check_shape(name, mask, "[B, length]", (batch, length))
    return mask


class MatrixState(NamedTuple):
    """The arguments that recurrences with a matrix state [B, H, K, V] have in common, as JAX
    arrays; layouts as in their `api.py`. The initial state is given, and float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay_log: jax.Array | None
    scale: float
    initial_state: jax.Array
    segment_ids: jax.Array | None
    num_segments: int | None


def matrix_state(
    q: Any,
    k: Any,
    v: Any,
    decay_log: Any,
    scale: Any,
    initial_state: Any,
    segment_ids: Any,
    num_segments: Any,
) -> MatrixState:
    """The arguments, checked. Raises ValueError for what these recurrences refuse in common."""
    q, k, v, decay_log, initial_state = floats(
        q=q, k=k, v=v, decay_log=decay_log, initial_state=initial_state
    )
    if num_segments is not None:
        num_segments = integer("num_segments", num_segments, 1, " or None")
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
    segment_ids = checked_segment_ids(segment_ids, batch, length, num_segments)
    segments = () if num_segments is None else (num_segments,)
    shape = (batch, *segments, heads, key_size, value_size)
    if initial_state is None:
        initial_state = jnp.zeros(shape, jnp.float32)
    layout = "[B, H, K, V]" if num_segments is None else "[B, num_segments, H, K, V]"
    check_shape("initial_state", initial_state, layout, shape)
    return MatrixState(
        q,
        k,
        v,
        decay_log,
        scale_of(scale, key_size),
        initial_state.astype(jnp.float32),
        segment_ids,
        num_segments,
    )
