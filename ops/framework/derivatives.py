"""Derivatives of an op, of any order and in either direction, from its forward and backward rules.

A gradient is made of these two rules and of nothing else. What goes beyond it takes the plain JAX
form of the op, whatever implementation runs:

    tangents of outputs     the backward rule is linear in the cotangents of the outputs; its
                            transpose maps tangents of inputs to tangents of outputs, and needs no
                            more residuals than the backward rule has
    derivatives of a rule   those of its plain form (`platforms.by_platform`)

To JAX the map between tangents is one primitive, of which nothing is traced where a gradient
transposes it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.dtypes import float0
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Leaves = Sequence[Any]


def differentiable(
    forward: Callable[..., Any],
    forward_rule: Callable[..., tuple[Any, Any]],
    backward: Callable[..., tuple[Any, ...]],
    plain_backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """`forward`, differentiable in those leaves of its inputs that are floats.

    forward: (call, *inputs) -> outputs, a tuple; those that are not floats come last.
    forward_rule: (call, *inputs) -> outputs, residuals.
    backward: (call, residuals, cotangents) -> gradients of the inputs, None where there is none,
      from the cotangents of the outputs that are floats.
    plain_backward: the same in plain JAX.

    call: what is static, hashable."""
    run: Any = jax.custom_jvp(forward, nondiff_argnums=(0,))

    @run.defjvp
    def outputs_and_tangents(call: Any, inputs: Any, tangents: Any) -> tuple[Any, Any]:
        outputs, residuals = forward_rule(call, *inputs)
        leaves, tree = jax.tree.flatten(residuals)
        results, results_tree = jax.tree.flatten(tuple(x for x in outputs if is_float(x)))
        shapes = tuple(_shapes(filter(is_float, jax.tree.leaves(x))) for x in inputs)
        moving = [t for t in jax.tree.leaves(tangents) if t.dtype != float0]
        given = call, tree, results_tree, shapes
        pull, plain_pull = _Pull(backward, *given), _Pull(plain_backward, *given)
        tangent_map = _TangentMap(pull, plain_pull, _shapes(results), len(leaves))
        moved = _tangents_p.bind(*leaves, *moving, map=tangent_map)
        still = (
            jax.tree.map(lambda x: np.zeros(x.shape, float0), x) for x in outputs if not is_float(x)
        )
        return outputs, (*results_tree.unflatten(moved), *still)

    return run


def is_float(value: Any) -> bool:
    """Whether all leaves of a value are floats."""
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value))


def _shapes(arrays: Any) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in arrays)


def _zeros(shapes: Any) -> Leaves:
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]


@dataclass(frozen=True)
class _Pull:
    """A backward rule on leaves: (residuals, cotangents) -> gradients of the float leaves of the
    inputs, zeros where the rule has none."""

    rule: Callable[..., tuple[Any, ...]]
    call: Any
    residuals: Any  # tree
    outputs: Any  # tree of those that are floats
    inputs: tuple[tuple[Any, ...], ...]  # of each, shapes and dtypes of its float leaves

    def __call__(self, residuals: Leaves, cotangents: Leaves) -> Leaves:
        gradients = self.rule(
            self.call, self.residuals.unflatten(residuals), self.outputs.unflatten(cotangents)
        )
        leaves = (
            jax.tree.leaves(gradient) or _zeros(shapes)
            for gradient, shapes in zip(gradients, self.inputs, strict=True)
        )
        return [leaf for of_input in leaves for leaf in of_input]


@dataclass(frozen=True)
class _Mapped:
    """A pull over an axis: the first of cotangents and gradients, any or none of each residual."""

    pull: Callable[[Leaves, Leaves], Leaves]
    axes: tuple[int | None, ...]

    def __call__(self, residuals: Leaves, cotangents: Leaves) -> Leaves:
        return jax.vmap(self.pull, (list(self.axes), 0))(list(residuals), list(cotangents))


@dataclass(frozen=True)
class _TangentMap:
    """The linear map from tangents of inputs to tangents of outputs, by its transposes."""

    pull: Callable[[Leaves, Leaves], Leaves]
    plain_pull: Callable[[Leaves, Leaves], Leaves]
    outputs: tuple[Any, ...]  # shapes and dtypes
    residuals: int  # how many leaves

    def push(self, residuals: Leaves, tangents: Leaves) -> Leaves:
        """Tangents of the outputs."""
        pull = functools.partial(self.plain_pull, list(residuals))
        _, transpose = jax.vjp(pull, _zeros(self.outputs))
        return transpose(list(tangents))[0]


_tangents_p = Primitive("tangents_of_op")
_tangents_p.multiple_results = True


@_tangents_p.def_abstract_eval
def _abstract(*leaves: Any, map: _TangentMap) -> Any:
    del leaves
    return [ShapedArray(shape, dtype) for shape, dtype in map.outputs]


def _pushed(*leaves: Any, map: _TangentMap) -> Any:
    return map.push(leaves[: map.residuals], leaves[map.residuals :])


_evaluated = jax.jit(_pushed, static_argnames="map")
_tangents_p.def_impl(_evaluated)
mlir.register_lowering(_tangents_p, mlir.lower_fun(_pushed, multiple_results=True))


def _transposed(cotangents: Any, *leaves: Any, map: _TangentMap) -> Any:
    residuals, tangents = leaves[: map.residuals], leaves[map.residuals :]
    gradients = map.pull(residuals, [ad.instantiate_zeros(x) for x in cotangents])
    linear = (
        gradient if ad.is_undefined_primal(tangent) else None
        for gradient, tangent in zip(gradients, tangents, strict=True)
    )
    return [*(None for _ in residuals), *linear]


ad.primitive_transposes[_tangents_p] = _transposed


def _differentiated(primals: Any, tangents: Any, *, map: _TangentMap) -> Any:
    """The map is linear in the tangents of inputs, and smooth in the residuals."""
    count = map.residuals
    given, moved = primals[count:], tangents[count:]
    terms = []
    if any(type(t) is not ad.Zero for t in moved):
        moved = [ad.instantiate_zeros(t) for t in moved]
        terms.append(_tangents_p.bind(*primals[:count], *moved, map=map))

    def of_residuals(*residuals: Any) -> Leaves:
        return map.push(residuals, given)

    terms.append(jvp_of_floats(of_residuals, primals[:count], tangents[:count]))
    return _tangents_p.bind(*primals, map=map), [
        functools.reduce(ad.add_tangents, parts) for parts in zip(*terms, strict=True)
    ]


ad.primitive_jvps[_tangents_p] = _differentiated


def jvp_of_floats(function: Callable[..., Leaves], primals: Leaves, tangents: Leaves) -> Leaves:
    """Tangents of the function's results, of inputs with tangents that may be `ad.Zero`; those of
    what is not a float are zeros."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero and is_float(primals[i])]

    def of_moving(*values: Any) -> Leaves:
        arguments = list(primals)
        for i, value in zip(moving, values, strict=True):
            arguments[i] = value
        return tuple(function(*arguments))

    if not moving:
        results = jax.eval_shape(of_moving)
        return [ad.Zero(ShapedArray(x.shape, x.dtype).to_tangent_aval()) for x in results]
    results, moved = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return [
        t if is_float(x) else ad.Zero(ShapedArray(x.shape, x.dtype).to_tangent_aval())
        for x, t in zip(results, moved, strict=True)
    ]


def _batched(leaves: Any, axes: Any, *, map: _TangentMap) -> tuple[Any, Any]:
    count = map.residuals
    (size,) = {x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None}
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(leaves[count:], axes[count:], strict=True)
    ]
    of_residuals = tuple(axes[:count])
    mapped = _TangentMap(
        _Mapped(map.pull, of_residuals),
        _Mapped(map.plain_pull, of_residuals),
        tuple(((size, *shape), dtype) for shape, dtype in map.outputs),
        count,
    )
    results = _tangents_p.bind(*leaves[:count], *moved, map=mapped)
    return results, [0] * len(results)


batching.primitive_batchers[_tangents_p] = _batched
