"""What every op is made of: two rules, forward and backward, chosen by platform and cut over the
mesh.

An op is one `jax.custom_vjp`, and under a mesh its forward and its backward rule are one
`shard_map` each. The differentiation is outside: cotangents are those of global arrays. (Inside,
with an output that all devices along an axis hold, each of them would receive the cotangent divided
by their number.) What is kept for the backward rule are the inputs, unless the op says that an
output serves better in the place of one, where time is cut the state that came in from the left,
and, if the op has them, states on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AbstractMesh

from . import platforms, sequence_parallel, sharding


class OverTime(Protocol):
    """An op on devices that hold consecutive parts of time; see
    `ops/framework/sequence_parallel.py`."""

    # (local, line, *inputs) -> outputs, carried; (local, line, carried, inputs, cotangents) ->
    # gradients
    @property
    def forward(self) -> Callable[..., tuple[Any, Any]]: ...
    @property
    def backward(self) -> Callable[..., tuple[Any, ...]]: ...


def _inputs(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    del outputs
    return inputs


@dataclass(frozen=True, eq=False)
class Op:
    """name: of the public function; implementations: modules with `forward` and `backward`;
    over_time: where time is cut, None for an op whose layouts leave time whole; kept: inputs and
    outputs -> what the backward rule takes in the place of the inputs, each of the shape and layout
    of the input, so that `supports` is asked about its dtype; starts: whether the modules'
    `forward` returns one value more, with `with_starts=True` the states at the starts of chunks (or
    None), which `backward` takes after the inputs."""

    name: str
    implementations: Mapping[str, ModuleType]
    over_time: OverTime | None = None
    kept: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] = _inputs
    starts: bool = False


class _Call(NamedTuple):
    """All that is static in a call; hashable."""

    op: Op
    candidates: tuple[str, ...]  # implementations to choose from
    named: bool  # by the caller: the one candidate runs or raises
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: tuple[Any, ...]
    input_dtypes: tuple[Any, ...]  # those of gradients
    static: tuple[tuple[str, Any], ...]
    mesh: AbstractMesh | None
    method: str

    @property
    def implementations(self) -> Mapping[str, ModuleType]:
        return {name: self.op.implementations[name] for name in self.candidates}


class Local(NamedTuple):
    """The rules of a call on the arrays of one device.

    partial: places of the inputs whose gradients other devices still add to; they stay float32
    until then;
    differentiated: whether a backward rule will follow; starts: what its forward rule left, or
    None."""

    call: _Call
    partial: frozenset[int] = frozenset()
    differentiated: bool = False
    starts: Any = None

    @property
    def static(self) -> dict[str, Any]:
        return dict(self.call.static)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return self._replace(differentiated=False).forward_and_starts(*inputs)[0]

    def forward_and_starts(self, *inputs: Any) -> tuple[tuple[Any, ...], Any]:
        """The outputs, and the states at the starts of chunks where the backward rule will take
        them, else None."""
        call, static, dtypes = self.call, self.static, self.call.dtypes
        if call.op.starts:
            static["with_starts"] = self.differentiated
            dtypes = *dtypes, jnp.dtype(jnp.float32)
        values = platforms.call(
            call.implementations, "forward", *inputs, named=call.named, dtypes=dtypes, **static
        )
        return (values[:-1], values[-1]) if call.op.starts else (values, None)

    def backward(self, inputs: Any, cotangents: Any) -> tuple[Any, ...]:
        """Gradients of the inputs, given what the op keeps for them, up to the last that has
        one."""
        call = self.call

        def dtype(place: int) -> Any:
            wide = jnp.dtype(jnp.float32) if place in self.partial else None
            return jax.tree.map(lambda dtype: wide or dtype, call.input_dtypes[place])

        return platforms.call(
            call.implementations,
            "backward",
            *inputs,
            *((self.starts,) if call.op.starts else ()),
            *cotangents,
            named=call.named,
            dtypes=tuple(dtype(place) for place in range(len(inputs))),
            **self.static,
        )


def run(
    op: Op,
    implementation: str | None,
    *inputs: Any,
    layouts: tuple[str, ...],
    outputs: tuple[str, ...],
    dtypes: tuple[Any, ...] = (),
    **static: Any,
) -> Any:
    """The outputs of an op, differentiable in its inputs but those that its backward rules leave
    out at the end.

    inputs: arrays, trees of arrays or None; layouts: of each, in the letters of
    `ops/framework/sharding.py`; outputs: layouts of the outputs; dtypes: of the outputs, where
    implementations would write others."""
    call = _Call(
        op,
        platforms.candidates(op.implementations, implementation),
        implementation is not None,
        sharding.in_context(layouts),
        sharding.in_context(outputs),
        dtypes,
        jax.tree.map(lambda x: x.dtype, inputs),
        tuple(sorted(static.items())),
        sharding.ambient_mesh(),
        sequence_parallel.current_method(),
    )
    return _run(call, *inputs)


def _forward(call: _Call, *inputs: Any) -> Any:
    return _outputs(Local(call), inputs)[0]


def _forward_rule(call: _Call, *inputs: Any) -> tuple[Any, Any]:
    outputs, carried = _outputs(Local(call, differentiated=True), inputs)
    return outputs, (call.op.kept(inputs, outputs), carried)


def _outputs(local: Local, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The outputs, and what each device keeps for itself: where time is cut what came in, else the
    starts."""
    call, mesh = local.call, local.call.mesh
    if mesh is None:
        return local.forward_and_starts(*inputs)
    in_specs = sharding.specs(call.op.name, mesh, call.inputs, inputs)
    line, everywhere = _line(call, mesh), P(mesh.axis_names)

    def on_device(*inputs: Any) -> tuple[Any, Any]:
        if line is None or call.op.over_time is None:
            outputs, carried = local.forward_and_starts(*inputs)
        else:
            outputs, carried = call.op.over_time.forward(local, line, *inputs)
        return outputs, jax.tree.map(lambda x: x[None], carried)

    shapes = jax.eval_shape(local.forward, *inputs)
    out_specs = sharding.specs(call.op.name, mesh, call.outputs, shapes)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=(out_specs, everywhere), check_vma=False
    )(*inputs)


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (inputs, carried), mesh = residuals, call.mesh
    # An output that is not a float has no cotangent.
    floats = [i for i, x in enumerate(cotangents) if _is_float(x)]
    cotangents = tuple(cotangents[i] for i in floats)
    if mesh is None:
        gradients = Local(call, starts=carried).backward(inputs, cotangents)
        return _padded(gradients, inputs)
    in_specs = sharding.specs(call.op.name, mesh, call.inputs, inputs)
    cotangent_layouts = [call.outputs[i] for i in floats]
    cotangent_specs = sharding.specs(call.op.name, mesh, cotangent_layouts, cotangents)
    line, everywhere = _line(call, mesh), P(mesh.axis_names)
    # An input that several devices share collects what each of them computed.
    computing = sharding.axes_of(in_specs)
    missing = [
        tuple(sorted(computing - _held(layout, spec)))
        for layout, spec in zip(call.inputs, in_specs, strict=True)
    ]
    local = Local(call, frozenset(i for i, axes in enumerate(missing) if axes))

    def on_device(inputs: Any, carried: Any, cotangents: Any) -> tuple[Any, ...]:
        carried = jax.tree.map(lambda x: x[0], carried)
        if line is None or call.op.over_time is None:
            gradients = local._replace(starts=carried).backward(inputs, cotangents)
        else:
            gradients = call.op.over_time.backward(local, line, carried, inputs, cotangents)
        return tuple(
            _summed(gradient, axes, dtypes)
            for gradient, axes, dtypes in zip(
                _padded(gradients, inputs), missing, call.input_dtypes, strict=True
            )
        )

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(in_specs, everywhere, cotangent_specs),
        out_specs=tuple(
            spec if _is_float(x) else None for x, spec in zip(inputs, in_specs, strict=True)
        ),
        check_vma=False,
    )(inputs, carried, cotangents)


def _padded(gradients: tuple[Any, ...], inputs: Any) -> tuple[Any, ...]:
    """None for the inputs after the last that has a gradient."""
    return (*gradients, *(None,) * (len(inputs) - len(gradients)))


def _line(call: _Call, mesh: Any) -> sequence_parallel.Line | None:
    size = sharding.axis_size(mesh, sharding.SEQUENCE)
    if size == 1 or not any("T" in layout for layout in call.inputs):
        return None
    return sequence_parallel.Line(size, call.method)


def _is_float(value: Any) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value))


def _held(layout: str, spec: Any) -> set[str]:
    """The axes along which each device computes a gradient of its own: those that cut the input,
    and time for a state, the gradient of which every device along time computes whole."""
    is_state = "B" in layout and "T" not in layout
    return sharding.axes_of(spec) | ({sharding.SEQUENCE} if is_state else set())


def _summed(gradient: Any, axes: tuple[str, ...], dtypes: Any) -> Any:
    if gradient is None or not axes:
        return gradient
    gradient = lax.psum(gradient, axes)
    return jax.tree.map(lambda total, dtype: total.astype(dtype), gradient, dtypes)


_run: Any = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_run.defvjp(_forward_rule, _backward)
