"""Which implementation of an op runs, decided by the platform that a program is lowered for.

An op has two rules, forward and backward (`derivatives.py`), which ask here, and here alone. Asked
*inside* each rule, a program compiled ahead of time for a TPU on a CPU host takes the TPU kernel,
and a scan over layers stores one set of residuals (`ops/framework/op.py`), not one per candidate.

A rule of a kernel module takes `interpret`, which is decided here too: a kernel that was named is
compiled on its own platform and interpreted on a CPU, which is how it is tested.

`jax.lax.platform_dependent` would trace every form wherever it is called. Ours are kernels, whose
bodies take longer to trace than a whole plain form takes to compile; a program for a CPU should not
pay for those of a TPU and a GPU. Hence `by_platform`, which traces what is lowered."""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .derivatives import jvp_of_floats

PLATFORMS = ("cpu", "cuda", "tpu")
# The kernels of each platform. `implementation=None` takes them there, where the op has them, and
# `xla` everywhere else.
KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}

_kernels = contextvars.ContextVar("kernels", default=True)


@contextlib.contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """A context in which ops that are traced take a kernel where their `implementation` is None
    only if `wanted`; else the plain JAX form runs on every platform. A program that was traced
    before keeps its own."""
    token = _kernels.set(wanted)
    try:
        yield
    finally:
        _kernels.reset(token)


def candidates(modules: Mapping[str, ModuleType], implementation: str | None) -> tuple[str, ...]:
    """The names of the implementations that a call may take: the one that was named, or those that
    None chooses from here."""
    if implementation is not None:
        return (implementation,)
    return tuple(name for name in modules if _kernels.get() or name not in KERNELS.values())


def checked_implementation(
    op: str, implementation: str | None, modules: Mapping[str, ModuleType], batch: int
) -> str | None:
    """The implementation to take: the one that was asked for, but "reference" for an empty batch,
    of which there is nothing to compute.

    Raises ValueError unless it is None, "reference" or one of the op's differentiable
    implementations."""
    names = ("reference", *modules)
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation of {op} must be None or one of {', '.join(names)}; got"
            f" {implementation!r}"
        )
    return implementation if batch else "reference"


def call(
    modules: Mapping[str, ModuleType],
    rules: Mapping[str, Callable[..., Sequence[Any]]],
    *args: Any,
    named: bool,
    plain: Callable[..., Sequence[Any]],
    dtypes: Sequence[Any] = (),
    **static: Any,
) -> Any:
    """The results of one of `rules`, given `args` (pytrees of arrays) and `static`.

    modules, rules: of the candidates, by name; a rule is hashable, and equal in equal calls. named:
    there is one candidate, which runs or raises ValueError. Otherwise the kernels of the lowering
    platform run where their module's `supports` agrees, else `xla`, with a warning where the module
    says `WARNS_UNSUPPORTED`. plain: the rule of `xla`, which
    is differentiated in the place of a kernel. dtypes: one (or a tree) for each result at least,
    which the results take: a kernel writes its own, and alternatives must agree."""
    supported = {name: m for name, m in modules.items() if _supports(m, args, static)}
    if named and not supported:
        ((name, module),) = modules.items()
        shapes = ", ".join(f"{x.dtype}{x.shape}" for x in jax.tree.leaves(args))
        raise ValueError(f"implementation {name!r} takes {module.SUPPORTED}; got {shapes}")
    runnable = {name: rules[name] for name in supported}
    for name, module in modules.items():
        if name not in supported and getattr(module, "WARNS_UNSUPPORTED", False):
            runnable[name] = _Instead(rules["xla"], f"{module.__name__} takes {module.SUPPORTED}")
    choice = _Choice(
        tuple(runnable.items()), plain, named, tuple(dtypes), tuple(sorted(static.items()))
    )
    return _run(choice, *args)


def _supports(module: ModuleType, args: Any, static: Mapping[str, Any]) -> bool:
    """What the module says of these arguments, of either rule; one that does not say takes all."""
    supports = getattr(module, "supports", None)
    return supports is None or supports(*args, **static)


class _Instead(NamedTuple):
    """The rule that runs in the place of a kernel, with a warning where it does."""

    rule: Callable[..., Sequence[Any]]
    reason: str

    def __call__(self, *args: Any, interpret: bool, **static: Any) -> Sequence[Any]:
        del interpret
        shapes = ", ".join(f"{x.dtype}{x.shape}" for x in jax.tree.leaves(args))
        message = f"plain JAX in the place of a kernel: {self.reason}; got {shapes}"
        warnings.warn(message, stacklevel=2)
        return self.rule(*args, **static)


class _Choice(NamedTuple):
    """What decides about a program besides its arguments; hashable."""

    rules: tuple[tuple[str, Callable[..., Sequence[Any]]], ...]  # by name of the implementation
    plain: Callable[..., Sequence[Any]]
    named: bool
    dtypes: tuple[Any, ...]
    static: tuple[tuple[str, Any], ...]


# Compiled, so that a rule is traced once per shape, not in every layer and not in every eager call.
@functools.partial(jax.jit, static_argnums=0)
def _run(choice: _Choice, *args: Any) -> Any:
    rules = dict(choice.rules)
    kernels = {platform: rules[name] for platform, name in KERNELS.items() if name in rules}

    def form(rule: Callable[..., Sequence[Any]], **options: bool) -> Callable[..., Any]:
        return functools.partial(_results, choice, rule, options)

    if not kernels:
        (rule,) = rules.values()
        return form(rule)(*args)
    forms = {platform: form(rule, interpret=False) for platform, rule in kernels.items()}
    if not choice.named:
        return by_platform(forms, *args, default=form(rules["xla"]))
    (rule,) = kernels.values()
    forms["cpu"] = form(rule, interpret=True)
    return by_platform(forms, *args, differentiated=form(choice.plain))


def _results(
    choice: _Choice, rule: Callable[..., Sequence[Any]], options: Mapping[str, bool], *args: Any
) -> tuple[Any, ...]:
    """What the rule returns, in the dtypes that were asked for."""
    values = tuple(rule(*args, **dict(choice.static), **options))
    if not choice.dtypes:
        return values
    return tuple(
        None if x is None else jax.tree.map(lambda leaf, to: leaf.astype(to), x, to)
        for x, to in zip(values, choice.dtypes, strict=False)
    )


# --- Forms by platform ----------------------------------------------------------------------------


def by_platform(
    forms: Mapping[str, Callable[..., Any]],
    *args: Any,
    default: Callable[..., Any] | None = None,
    differentiated: Callable[..., Any] | None = None,
) -> Any:
    """`forms[platform](*args)` for the platform that the program is lowered for, else
    `default(*args)`.

    All forms return the same shapes and dtypes. Without a default, lowering for a platform that has
    no form raises ValueError. differentiated: the form whose derivatives are those of all; None for
    the default."""
    arrays, tree = jax.tree.flatten(args)

    def on_arrays(form: Callable[..., Any]) -> Callable[..., Any]:
        # Compiled, so that its trace is kept for every program in which the same call stands.
        return jax.jit(lambda *arrays: form(*tree.unflatten(arrays)))

    jitted = {platform: on_arrays(form) for platform, form in forms.items()}
    jitted_default = None if default is None else on_arrays(default)
    smooth = jitted_default if differentiated is None else on_arrays(differentiated)
    like = jitted_default or next(iter(jitted.values()))
    shapes, out_tree = jax.tree.flatten(jax.eval_shape(like, *arrays))
    results = _by_platform_p.bind(
        *arrays,
        forms=tuple(jitted.items()),
        default=jitted_default,
        differentiated=smooth,
        shapes=tuple((x.shape, x.dtype) for x in shapes),
    )
    return out_tree.unflatten(results)


def form_of(equation: Any, platform: str) -> Callable[..., Any] | None:
    """What an equation of a jaxpr runs on `platform`: a function of its inputs, or None if it is no
    such choice."""
    if equation.primitive is not _by_platform_p:
        return None
    return _form(platform, equation.params["forms"], equation.params["default"])


def _form(platform: str, forms: Sequence[Any], default: Any) -> Callable[..., Any]:
    form = dict(forms).get(platform, default)
    if form is None:
        known = ", ".join(name for name, _ in forms)
        raise ValueError(
            f"this implementation has forms for {known}, but the program is lowered for"
            f" {platform}: use another implementation there"
        )
    return form


_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True


@_by_platform_p.def_abstract_eval
def _abstract(*arrays: Any, shapes: Any, **forms: Any) -> Any:
    del arrays, forms
    return [ShapedArray(shape, dtype) for shape, dtype in shapes]


def _batched(
    arrays: Any, axes: Any, *, forms: Any, default: Any, differentiated: Any, shapes: Any
) -> tuple[Any, Any]:
    in_axes = tuple(axes)  # None: not mapped

    def mapped(form: Any) -> Any:
        return None if form is None else jax.jit(jax.vmap(form, in_axes))

    of_default = mapped(default)
    (size,) = {x.shape[axis] for x, axis in zip(arrays, in_axes, strict=True) if axis is not None}
    results = _by_platform_p.bind(
        *arrays,
        forms=tuple((name, mapped(form)) for name, form in forms),
        default=of_default,
        differentiated=of_default if differentiated is default else mapped(differentiated),
        shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
    )
    return results, [0] * len(results)


@_by_platform_p.def_impl
def _evaluated(*arrays: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_by_platform_p.bind, **params))(*arrays)


batching.primitive_batchers[_by_platform_p] = _batched


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    results = _by_platform_p.bind(*primals, **params)
    form = params["differentiated"]
    return results, jvp_of_floats(lambda *arrays: jax.tree.leaves(form(*arrays)), primals, tangents)


ad.primitive_jvps[_by_platform_p] = _jvp


def _lowering(platform: str) -> Callable[..., Any]:
    def run(*arrays: Any, forms: Any, default: Any, **others: Any) -> Any:
        del others
        return jax.tree.leaves(_form(platform, forms, default)(*arrays))

    return mlir.lower_fun(run, multiple_results=True)


for _platform in PLATFORMS:
    mlir.register_lowering(_by_platform_p, _lowering(_platform), platform=_platform)
mlir.register_lowering(_by_platform_p, _lowering("another platform"))
