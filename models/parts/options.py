"""What an option may be, written as its type in a signature, and the check of what a config gives.

    heads: Size = 4     norm_eps: Epsilon = 1e-5     lengths: tuple[Size, ...] = ()

A type without a range is checked as a type: a bool is no int, an int is a float."""

import collections.abc
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

# Indices of arrays, and counters in the state of a run, are int32.
INT32_END = 2**31
FLOAT32_LARGEST = 3.4028235e38
FLOAT32_SMALLEST = 1.1754944e-38  # smaller ones lose digits, and then are 0


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without the ends named in `open`: "low", "high" or both."""

    low: float
    high: float
    open: tuple[str, ...] = ()

    def __contains__(self, value: float) -> bool:
        above = value > self.low if "low" in self.open else value >= self.low
        return above and (value < self.high if "high" in self.open else value <= self.high)

    def __str__(self) -> str:
        names = {INT32_END: "2^31", FLOAT32_LARGEST: "3.4e38", FLOAT32_SMALLEST: "1.2e-38"}
        low, high = (names.get(end, f"{end:.10g}") for end in (self.low, self.high))
        return f"{'[('['low' in self.open]}{low}, {high}{'])'['high' in self.open]}"


Size = Annotated[int, Range(1, INT32_END, ("high",))]
Count = Annotated[int, Range(0, INT32_END, ("high",))]
Depth = Annotated[int, Range(1, 10_000)]  # the deepest networks that were trained
Reach = Annotated[int, Range(1, 2**24)]  # tokens that a mixer keeps or reaches back
# What multiplies something of about 1: inner widths, time steps, temperatures, first values. Beyond
# a thousand it is a slip of the pen.
Factor = Annotated[float, Range(FLOAT32_SMALLEST, 1000)]
Weight = Annotated[float, Range(0, 1000)]
Probability = Annotated[float, Range(0, 1, ("high",))]  # of what must not always happen
# What is added to a variance of about 1.
Epsilon = Annotated[float, Range(FLOAT32_SMALLEST, 1)]

# Keyword arguments of models and mixers that the builder fills in; they are not options of a
# config.
SUPPLIED = ("depth", "layer", "rngs", "param_dtype", "compute_dtype")


def check_options(
    what: str,
    where: str,
    options: Mapping[str, Any],
    *configured: type,
    supplied: tuple[str, ...] = SUPPLIED,
) -> None:
    """Raises ValueError unless `options` are keyword arguments of the `configured` classes with
    values of their types, and all that have no default are among them.

    `what` names the configured thing and `where` the config field, for the message; `supplied` are
    arguments that come from the caller."""
    parameters = {
        name: parameter
        for one in configured
        for name, parameter in inspect.signature(one.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in supplied
    }
    known = ", ".join(sorted(parameters))
    for name in options:
        if name not in parameters:
            raise ValueError(f"{what} has no option {name!r}; known options in {where}: {known}")
        check_value(f"config.{where}.{name}", parameters[name].annotation, options[name])
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ValueError(
                f"{what} needs the option {name!r}; set {where}.{name} (known options: {known})"
            )


def check_value(key: str, kind: Any, value: Any) -> None:
    """Raises ValueError, naming the key, unless `value` is of a type as signatures have them."""
    if not _fits(kind, value):
        raise ValueError(f"{key} must be {_expected(kind)}; got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(arguments[0], value) and all(value in part for part in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin in (tuple, collections.abc.Sequence):  # JSON has lists for both
        if origin is not tuple and isinstance(value, str):
            return True  # the classic slip ("gla") for ("gla",), of which its user tells better
        each = _elements(kind, value) if isinstance(value, tuple | list) else None
        return each is not None and all(map(_fits, each, value))
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float)
        # No comparison with NaN holds.
        small = number and (kind is int or abs(value) <= FLOAT32_LARGEST)
        return small and not isinstance(value, bool)
    return kind is Any or isinstance(value, origin or kind)


def _elements(kind: Any, value: tuple[Any, ...] | list[Any]) -> tuple[Any, ...] | None:
    """The type of each element of a sequence; None if it has another length."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return arguments if len(value) == len(arguments) else None
    return arguments[:1] * len(value)


def _expected(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        noun = "an integer" if arguments[0] is int else "a finite number"
        return f"{noun} in {' and '.join(map(str, arguments[1:]))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, arguments))
    if origin in (tuple, collections.abc.Sequence):
        each = [argument for argument in arguments if argument is not Ellipsis]
        if len(each) == len(arguments) > 1:
            return f"a tuple of {len(each)} ({', '.join(map(_expected, each))})"
        return f"a tuple whose elements are each {_expected(each[0])}"
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "True or False"}
    names |= {collections.abc.Mapping: "a section of options", type(None): "None"}
    return names.get(origin or kind, str(kind))


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
