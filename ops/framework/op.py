"""What every op is made of: two rules, forward and backward, chosen by platform and cut over the
mesh.

The life of a call:

1. The public function in `api.py` checks its arguments and calls `run` with the arrays, a layout
   for each (`sharding.py`) and what is static.
2. `run` gathers what is static in a `_Call` and enters one function that JAX differentiates by two
   rules (`derivatives.py`).
3. Without a mesh, the rule of an implementation runs on the whole arrays. Under a mesh, one
   `shard_map` gives each device its part of them, and the rule runs there (`DeviceRules`).
4. Where the mesh cuts time, the op's `sequence_parallel` rules stand around that: they exchange
   states with the other devices (`sequence_parallel.py`). With `reverse` they too are given arrays
   in the order of tokens, and take them from the last to the first.
5. `platforms.py` decides which implementation runs when the program is lowered. With `reverse` it
   gets its arrays flipped along time, unless it walks backwards by itself.
6. Kept for the backward pass are the inputs, unless `Op.residuals` says otherwise, and on each
   device what its forward rule left: the state that came in, states at the starts of chunks.
7. The backward pass goes through 3 to 5 with the cotangents. Gradients of inputs that several
   devices share are added up at the end, in float32.

The differentiation is outside of the `shard_map`: cotangents are those of global arrays. (Inside,
with an output that all devices along an axis hold, each of them would receive the cotangent divided
by their number.)"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AbstractMesh

from . import platforms, sharding
from .derivatives import differentiable, is_float
from .sequence_parallel import TimeAxis, current_method


class SequenceParallel(Protocol):
    """The rules of an op on devices that hold consecutive parts of time; see
    `sequence_parallel.py`."""

    # (rules, axis, *inputs) -> outputs, carried
    @property
    def forward(self) -> Callable[..., tuple[Any, Any]]: ...

    # (rules, axis, carried, inputs, cotangents) -> gradients
    @property
    def backward(self) -> Callable[..., tuple[Any, ...]]: ...


def _inputs(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    del outputs
    return inputs


@dataclass(frozen=True, eq=False)
class Op:
    """A public function by its rules.

    name: of the function, for messages.
    implementations: modules by their public names, with a `forward` and a `backward` each. A module
      may say what inputs it takes, the same for both rules, by `supports` and `SUPPORTED`, with
      `WARNS_UNSUPPORTED = True` that others deserve a warning, and with `WALKS_BACKWARDS = True`
      that its rules take `reverse`.
    sequence_parallel: the rules where time is cut; None for an op whose layouts leave time whole.
    residuals: (inputs, outputs) -> what the backward rule takes in the place of the inputs, each of
      the shape and layout of that input, so that `supports` can be asked about it.
    keeps_chunk_states: whether `forward` takes `with_chunk_states` and returns one value more: if
      true the states at the starts of chunks, of one shape in all implementations, or None. The
      `backward` of the same implementation takes them after the inputs."""

    name: str
    implementations: Mapping[str, ModuleType]
    sequence_parallel: SequenceParallel | None = None
    residuals: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]] = _inputs
    keeps_chunk_states: bool = False


class _Call(NamedTuple):
    """All that is static in a call; hashable."""

    op: Op
    candidates: tuple[str, ...]  # implementations to choose from
    named: bool  # by the caller: the one candidate runs or raises
    input_layouts: tuple[str, ...]
    output_layouts: tuple[str, ...]  # outputs that are not floats come last
    output_dtypes: tuple[Any, ...]
    input_dtypes: tuple[Any, ...]  # those of gradients
    reverse: bool
    static: tuple[tuple[str, Any], ...]
    mesh: AbstractMesh | None
    method: str  # how states travel

    @property
    def implementations(self) -> Mapping[str, ModuleType]:
        return {name: self.op.implementations[name] for name in self.candidates}


class DeviceRules(NamedTuple):
    """The rules of a call on the arrays of one device."""

    call: _Call
    # Indices of inputs whose gradients are summed over devices afterwards, and float32 until then.
    partial: frozenset[int] = frozenset()
    differentiated: bool = False  # whether a backward rule will follow
    chunk_states: Any = None  # those that the forward rule left

    @property
    def static(self) -> dict[str, Any]:
        return dict(self.call.static)

    @property
    def reverse(self) -> bool:
        """Whether the op walks from the last token to the first."""
        return self.call.reverse

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs."""
        return self._replace(differentiated=False).forward_and_chunk_states(*inputs)[0]

    def forward_and_chunk_states(self, *inputs: Any) -> tuple[tuple[Any, ...], Any]:
        """The outputs, and the states at the starts of chunks where the backward rule will take
        them, else None."""
        call, static, dtypes = self.call, self.static, self.call.output_dtypes
        results = call.output_layouts
        if call.op.keeps_chunk_states:
            static["with_chunk_states"] = self.differentiated
            dtypes, results = (*dtypes, jnp.dtype(jnp.float32)), (*results, "")
        values = self._run("forward", inputs, call.input_layouts, results, dtypes, static)
        return (values[:-1], values[-1]) if call.op.keeps_chunk_states else (values, None)

    def backward(self, inputs: Any, cotangents: Any) -> tuple[Any, ...]:
        """Gradients of the inputs, given their residuals, up to the last that has one."""
        call = self.call

        def dtype(index: int) -> Any:
            wide = jnp.dtype(jnp.float32) if index in self.partial else None
            return jax.tree.map(lambda dtype: wide or dtype, call.input_dtypes[index])

        dtypes = tuple(dtype(index) for index in range(len(inputs)))
        arguments, layouts = tuple(inputs), call.input_layouts
        if call.op.keeps_chunk_states:
            arguments, layouts = (*arguments, self.chunk_states), (*layouts, "")
        arguments, layouts = (*arguments, *cotangents), (*layouts, *call.output_layouts)
        return self._run("backward", arguments, layouts, call.input_layouts, dtypes, self.static)

    def _run(
        self,
        rule: str,
        arguments: Sequence[Any],
        layouts: tuple[str, ...],
        results: tuple[str, ...],
        dtypes: tuple[Any, ...],
        static: dict[str, Any],
    ) -> tuple[Any, ...]:
        """layouts: of the arguments; results: layouts of what the rule returns."""
        call = self.call

        def in_order_of_tokens(module: ModuleType) -> Callable[..., Any]:
            function = getattr(module, rule)
            if not call.reverse:
                return function
            if getattr(module, "WALKS_BACKWARDS", False):
                return _walking_backwards(function)
            return _Turned(function, self.static.get("num_segments"), layouts, results)

        modules = call.implementations
        rules = {name: in_order_of_tokens(module) for name, module in modules.items()}
        plain = in_order_of_tokens(call.op.implementations["xla"])
        options = {"named": call.named, "plain": plain, "dtypes": dtypes}
        return platforms.call(modules, rules, *arguments, **options, **static)


@functools.cache  # one function for all calls, so that jax compiles it once
def _walking_backwards(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(function, reverse=True)


@dataclass(frozen=True)
class _Turned:
    """A rule of an implementation that walks from the first row to the last, as one of arrays in
    the order of tokens that are walked from the last to the first."""

    function: Callable[..., Any]
    num_segments: int | None  # where they have states of their own
    arguments: tuple[str, ...]  # layouts
    results: tuple[str, ...]  # layouts

    def __call__(self, *arguments: Any, **static: Any) -> tuple[Any, ...]:
        arguments = self._turned(arguments, self.arguments)
        return self._turned(self.function(*arguments, **static), self.results)

    def _turned(self, values: Sequence[Any], layouts: Sequence[str]) -> tuple[Any, ...]:
        """Values in the order of the walk from those in the order of tokens, and back; those of
        layout "" stay as they are.

        Segments that have states of their own come in the opposite order, too, and their ids count
        from the other end: along a walk ids never fall."""
        letters = "TL" if self.num_segments is None else "TLS"

        def turn(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            if self.num_segments is not None and jnp.issubdtype(x.dtype, jnp.integer):
                x = self.num_segments - 1 - x
            return jnp.flip(x, axes)

        def turned(value: Any, layout: str) -> Any:
            axes = tuple(axis for axis, letter in enumerate(layout) if letter in letters)
            return jax.tree.map(functools.partial(turn, axes=axes), value) if axes else value

        return tuple(map(turned, values, layouts))


def run(
    op: Op,
    implementation: str | None,
    *inputs: Any,
    layouts: tuple[str, ...],
    outputs: tuple[str, ...],
    dtypes: tuple[Any, ...] = (),
    reverse: bool = False,
    **static: Any,
) -> Any:
    """The outputs of an op, differentiable in its inputs but those that its backward rules leave
    out at the end.

    inputs: arrays, trees of arrays or None.
    layouts: of each input, in the letters of `sharding.py`.
    outputs: layouts of the outputs; those that are not floats come last.
    dtypes: of the outputs, where implementations would write others.
    reverse: the op walks from the last token to the first: its initial state is the one after the
      last token, its final state the one before the first.
    static: arguments of the rules that are no arrays."""
    call = _Call(
        op,
        platforms.candidates(op.implementations, implementation),
        implementation is not None,
        sharding.in_context(layouts),
        sharding.in_context(outputs),
        dtypes,
        jax.tree.map(lambda x: x.dtype, inputs),
        reverse,
        tuple(sorted(static.items())),
        sharding.ambient_mesh(),
        current_method(),
    )
    return _run(call, *inputs)


def _forward(call: _Call, *inputs: Any) -> Any:
    return _outputs(DeviceRules(call), inputs)[0]


def _forward_rule(call: _Call, *inputs: Any) -> tuple[Any, Any]:
    outputs, carried = _outputs(DeviceRules(call, differentiated=True), inputs)
    return outputs, (call.op.residuals(inputs, outputs), carried)


def _outputs(rules: DeviceRules, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """The outputs, and what each device keeps for itself: where time is cut what came in, else the
    states at the starts of chunks."""
    call, mesh = rules.call, rules.call.mesh
    if mesh is None:
        return rules.forward_and_chunk_states(*inputs)
    in_specs = sharding.specs(call.op.name, mesh, call.input_layouts, inputs)
    axis, everywhere = _time_axis(call, mesh), P(mesh.axis_names)

    def on_device(*inputs: Any) -> tuple[Any, Any]:
        if axis is None:
            outputs, carried = rules.forward_and_chunk_states(*inputs)
        else:
            outputs, carried = _sequence_parallel(call).forward(rules, axis, *inputs)
        return outputs, jax.tree.map(lambda x: x[None], carried)

    shapes = jax.eval_shape(rules.forward, *inputs)
    out_specs = sharding.specs(call.op.name, mesh, call.output_layouts, shapes)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=(out_specs, everywhere), check_vma=False
    )(*inputs)


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (inputs, carried), mesh = residuals, call.mesh
    if mesh is None:
        gradients = DeviceRules(call, chunk_states=carried).backward(inputs, cotangents)
        return _padded(gradients, inputs)
    in_specs = sharding.specs(call.op.name, mesh, call.input_layouts, inputs)
    layouts = call.output_layouts[: len(cotangents)]
    cotangent_specs = sharding.specs(call.op.name, mesh, layouts, cotangents)
    axis, everywhere = _time_axis(call, mesh), P(mesh.axis_names)
    # An input that several devices share collects what each of them computed.
    computing = sharding.axes_of(in_specs)
    missing = [
        tuple(sorted(computing - _held(layout, spec)))
        for layout, spec in zip(call.input_layouts, in_specs, strict=True)
    ]
    rules = DeviceRules(call, frozenset(i for i, axes in enumerate(missing) if axes))

    def on_device(inputs: Any, carried: Any, cotangents: Any) -> tuple[Any, ...]:
        carried = jax.tree.map(lambda x: x[0], carried)
        if axis is None:
            gradients = rules._replace(chunk_states=carried).backward(inputs, cotangents)
        else:
            cut = _sequence_parallel(call)
            gradients = cut.backward(rules, axis, carried, inputs, cotangents)
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
            spec if is_float(x) else None for x, spec in zip(inputs, in_specs, strict=True)
        ),
        check_vma=False,
    )(inputs, carried, cotangents)


def _padded(gradients: tuple[Any, ...], inputs: Any) -> tuple[Any, ...]:
    """The gradients, and None for the inputs after the last that has one."""
    return (*gradients, *(None,) * (len(inputs) - len(gradients)))


def _time_axis(call: _Call, mesh: Any) -> TimeAxis | None:
    """The devices that time is cut over; None where it is whole."""
    size = sharding.axis_size(mesh, sharding.SEQUENCE)
    is_cut = size > 1 and any("T" in layout for layout in call.input_layouts)
    if call.op.sequence_parallel is None or not is_cut:
        return None
    return TimeAxis(size, call.method, call.reverse)


def _sequence_parallel(call: _Call) -> SequenceParallel:
    assert call.op.sequence_parallel is not None
    return call.op.sequence_parallel


def _held(layout: str, spec: Any) -> set[str]:
    """The axes along which each device computes a gradient of its own: those that cut the input,
    and time for a state, the gradient of which every device along time computes whole."""
    is_state = "B" in layout and "T" not in layout
    return sharding.axes_of(spec) | ({sharding.SEQUENCE} if is_state else set())


def _summed(gradient: Any, axes: tuple[str, ...], dtypes: Any) -> Any:
    """The gradient summed over these axes of the mesh."""
    if gradient is None or not axes:
        return gradient
    gradient = lax.psum(gradient, axes)
    return jax.tree.map(lambda total, dtype: total.astype(dtype), gradient, dtypes)


def _plain_backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """`_backward` in plain JAX, on the whole arrays."""
    inputs, carried = residuals
    if call.mesh is not None:
        if dict(call.static).get("num_segments") is not None and _time_axis(call, call.mesh):
            raise NotImplementedError(
                f"{call.op.name} has no forward mode where a mesh cuts time, whose devices sort"
                " their own tokens: use jax.grad or jax.vjp, or a mesh with sequence=1"
            )
        carried = None  # what each device keeps is of its part
    plain = call._replace(candidates=("xla",), named=True, mesh=None)
    return _backward(plain, (inputs, carried), cotangents)


_run = differentiable(_forward, _forward_rule, _backward, _plain_backward)
