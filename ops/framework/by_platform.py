"""A computation with a form of its own for some platforms, of which only the one that is lowered is
traced.

`jax.lax.platform_dependent` traces every form wherever it is called. Ours are kernels, whose bodies
take longer to trace than a whole plain form takes to compile; a program for a CPU should not pay
for those of a TPU and a GPU."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = ("cpu", "cuda", "tpu")


def by_platform(
    forms: Mapping[str, Callable[..., Any]], *args: Any, default: Callable[..., Any] | None = None
) -> Any:
    """`forms[platform](*args)` for the platform that the program is lowered for, else
    `default(*args)`.

    All forms return the same shapes and dtypes. Without a default, lowering for a platform that has
    no form raises ValueError. Not differentiable: the ops call it inside their rules."""
    arrays, tree = jax.tree.flatten(args)

    def on_arrays(form: Callable[..., Any]) -> Callable[..., Any]:
        # Compiled, so that its trace is kept for every program in which the same call stands.
        return jax.jit(lambda *arrays: form(*tree.unflatten(arrays)))

    jitted = {platform: on_arrays(form) for platform, form in forms.items()}
    jitted_default = None if default is None else on_arrays(default)
    like = jitted_default or next(iter(jitted.values()))
    shapes, out_tree = jax.tree.flatten(jax.eval_shape(like, *arrays))
    results = _by_platform_p.bind(
        *arrays,
        forms=tuple(jitted.items()),
        default=jitted_default,
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
def _abstract(*arrays: Any, forms: Any, default: Any, shapes: Any) -> Any:
    del arrays, forms, default
    return [ShapedArray(shape, dtype) for shape, dtype in shapes]


def _batched(arrays: Any, axes: Any, *, forms: Any, default: Any, shapes: Any) -> tuple[Any, Any]:
    in_axes = tuple(axes)  # None: not mapped
    (size,) = {x.shape[axis] for x, axis in zip(arrays, in_axes, strict=True) if axis is not None}
    results = _by_platform_p.bind(
        *arrays,
        forms=tuple((name, jax.jit(jax.vmap(form, in_axes))) for name, form in forms),
        default=None if default is None else jax.jit(jax.vmap(default, in_axes)),
        shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
    )
    return results, [0] * len(results)


@_by_platform_p.def_impl
def _evaluated(*arrays: Any, **params: Any) -> Any:
    return jax.jit(functools.partial(_by_platform_p.bind, **params))(*arrays)


batching.primitive_batchers[_by_platform_p] = _batched


def _lowering(platform: str) -> Callable[..., Any]:
    def run(*arrays: Any, forms: Any, default: Any, shapes: Any) -> Any:
        del shapes
        return jax.tree.leaves(_form(platform, forms, default)(*arrays))

    return mlir.lower_fun(run, multiple_results=True)


for _platform in PLATFORMS:
    mlir.register_lowering(_by_platform_p, _lowering(_platform), platform=_platform)
mlir.register_lowering(_by_platform_p, _lowering("another platform"))
