"""Which implementation of an op runs.

An op is one `jax.custom_vjp` whose forward and backward rules ask here. The choice is made *inside*
each rule, by the platform the program is lowered for: a program compiled ahead of time for a TPU on
a CPU host takes the TPU kernel, and a scan over layers stores one set of residuals (what the op
keeps, `ops/framework/op.py`), not one per candidate."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax

from .by_platform import by_platform

# What `implementation=None` takes on each platform, where the op has it; everywhere else it takes
# `xla`.
PREFERRED = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}

_kernels = contextvars.ContextVar("kernels", default=True)


@contextlib.contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """Whether ops that are traced inside may take a kernel where their `implementation` is None;
    without, the plain JAX form runs on every platform. A program that was traced before keeps its
    own."""
    token = _kernels.set(wanted)
    try:
        yield
    finally:
        _kernels.reset(token)


def choice(modules: Mapping[str, ModuleType]) -> Mapping[str, ModuleType]:
    """Of these implementations those that None may take here."""
    if _kernels.get():
        return modules
    kernels = PREFERRED.values()
    return {name: module for name, module in modules.items() if name not in kernels}


def check_implementation(
    op: str, implementation: str | None, modules: Mapping[str, ModuleType]
) -> None:
    """Raises unless `implementation` is None, "reference" or one of the op's differentiable
    implementations."""
    names = ("reference", *modules)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation of {op} must be None or one of {', '.join(names)}; got"
            f" {implementation!r}"
        )


def call(
    modules: Mapping[str, ModuleType],
    rule: str,
    implementation: str | None,
    *args: Any,
    dtypes: Sequence[Any] = (),
    **static: Any,
) -> Any:
    """Runs `rule` ("forward" or "backward") of the chosen implementation on `args` (pytrees of
    arrays) and `static`.

    A named implementation runs or raises; None takes `PREFERRED` for the lowering platform where
    its `supports` agrees, else `xla`. `dtypes`, one (or a tree) for each result at least, are those
    that the results take: a kernel writes its own, and alternatives must agree."""
    if implementation is None:
        modules = {
            name: module for name, module in modules.items() if _supports(module, args, static)
        }
    elif not _supports(modules[implementation], args, static):
        shapes = ", ".join(f"{x.dtype}{x.shape}" for x in jax.tree.leaves(args))
        raise ValueError(
            f"implementation {implementation!r} takes"
            f" {modules[implementation].SUPPORTED}; got {shapes}"
        )
    functions = tuple((name, getattr(module, rule)) for name, module in modules.items())
    return _chosen(
        _Choice(functions, implementation, tuple(dtypes), tuple(sorted(static.items()))), *args
    )


def _supports(module: ModuleType, args: Any, static: Mapping[str, Any]) -> bool:
    """What the module says of these arguments, of either rule; one that does not say takes all."""
    supports = getattr(module, "supports", None)
    return supports is None or supports(*args, **static)


class _Choice(NamedTuple):
    """What decides about a program besides its arguments; hashable."""

    rules: tuple[tuple[str, Callable[..., Sequence[Any]]], ...]
    implementation: str | None
    dtypes: tuple[Any, ...]
    static: tuple[tuple[str, Any], ...]


# Compiled, so that a rule is traced once per shape, not in every layer and not in every eager call.
@functools.partial(jax.jit, static_argnums=0)
def _chosen(choice: _Choice, *args: Any) -> Any:
    def results(rule: Callable[..., Sequence[Any]], *args: Any) -> tuple[Any, ...]:
        values = tuple(rule(*args, **dict(choice.static)))
        if not choice.dtypes:
            return values
        return tuple(
            None if x is None else jax.tree.map(lambda leaf, to: leaf.astype(to), x, to)
            for x, to in zip(values, choice.dtypes, strict=False)
        )

    rules = {name: functools.partial(results, rule) for name, rule in choice.rules}
    if choice.implementation is not None:
        return rules[choice.implementation](*args)
    kernels = {platform: rules[name] for platform, name in PREFERRED.items() if name in rules}
    if not kernels:
        return rules["xla"](*args)
    return by_platform(kernels, *args, default=rules["xla"])
