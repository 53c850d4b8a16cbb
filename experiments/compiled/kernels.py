"""Matmul flops of Pallas kernels, which a compiled program does not show: counted in the jaxpr, per
run of a kernel.

One run is all steps of the grid; inside a shard_map, shapes are those on one device.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from experiments.compiled.cost import PASSES, Flops
from ops.framework.platforms import form_of


def kernel_flops(jaxpr: Any) -> dict[str, Flops]:
    """Flops of one run of every Pallas kernel in a jaxpr, by name; of runs that differ, the
    largest."""
    kernels: dict[str, Flops] = {}
    for call in kernel_calls(jaxpr):
        name = call.params["name"] or str(call.params["name_and_src_info"])
        grid = math.prod(call.params["grid_mapping"].grid)
        flops = _body_flops(call.params["jaxpr"]).times(grid)
        kernels[name] = max(flops, kernels.get(name, flops))
    return kernels


def kernel_calls(jaxpr: Any, platform: str = "tpu") -> Iterator[Any]:
    """The equations of a jaxpr that run a kernel where the program is lowered for `platform`, in
    order."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            if not equation.params["interpret"]:
                yield equation
            continue
        form = form_of(equation, platform)
        if form is not None:
            shapes = [x.aval for x in equation.invars]
            yield from kernel_calls(jax.make_jaxpr(form)(*shapes), platform)
        for inner in _inner(equation):
            yield from kernel_calls(inner, platform)


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def _body_flops(jaxpr: Any) -> Flops:
    """Flops of the matmuls of a kernel's body: of a conditional the dearest branch, of a scan all
    its turns."""
    total = Flops(0.0, 0.0)
    for equation in jaxpr.eqns:
        inner = [_body_flops(x) for x in _inner(equation)]
        if equation.primitive.name == "dot_general":
            inner = [_dot_general(equation)]
        elif equation.primitive.name == "cond":
            inner = [max(inner)]
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for flops in inner:
            total = Flops(total.flops + turns * flops.flops, total.passes + turns * flops.passes)
    return total


def _dot_general(equation: Any) -> Flops:
    left = equation.invars[0].aval
    ((contracted, _), _) = equation.params["dimension_numbers"]
    flops = 2.0 * math.prod(equation.outvars[0].aval.shape)
    flops *= math.prod(left.shape[axis] for axis in contracted)
    precision = equation.params["precision"]
    asked = precision if isinstance(precision, tuple) else (precision,)
    exact = max(PASSES.get(str(getattr(x, "name", "default")).lower(), 1) for x in asked)
    return Flops(flops, flops * (exact if left.dtype == jax.numpy.float32 else 1))
