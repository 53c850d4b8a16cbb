"""Where the arrays of an op lie on the ambient mesh.

An op that is called under `jax.set_mesh` runs on every device by itself, inside one `shard_map`
over all axes of the mesh: a kernel cannot be partitioned by the compiler. A layout names the
dimensions of an array by letters, and the letters say which mesh axes cut them:

    B       batch                       data x fsdp
    T       time                        sequence
    H       heads, or channels          tensor; a single one is not cut
    G       key heads                   tensor; likewise
    C       channels of an op that needs all of time: tensor x sequence
    P       parts of time of all sequences as a batch, the first parts first: sequence x data x fsdp
    L       time that is whole on each device: not cut
    _       left to the compiler, in `constrain`
    others  not cut

Axes of other names are left alone: devices along them compute the same.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import P
from jax.sharding import AbstractMesh, AxisType

SEQUENCE = "sequence"
AXES = {
    "B": ("data", "fsdp"),
    "T": (SEQUENCE,),
    "H": ("tensor",),
    "G": ("tensor",),
    "C": ("tensor", SEQUENCE),
    "P": (SEQUENCE, "data", "fsdp"),
}
NAMES = {
    "B": "batch size",
    "T": "length",
    "H": "number of heads (or channels)",
    "G": "number of key heads",
    "C": "number of channels",
    "P": "batch size times parts of time",
}
# Of a decay, by its number of dimensions.
DECAY_LAYOUTS = {1: "H", 3: "BTH", 4: "BTHK"}


def decay_layout(decay_log: jax.Array | None) -> str:
    """The layout of a decay: per head, per token, or per token and key channel; "" for None."""
    return "" if decay_log is None else DECAY_LAYOUTS[decay_log.ndim]


def ambient_mesh() -> AbstractMesh | None:
    """The mesh that an op is put on. None without a mesh, where the mesh has one device along every
    axis that an op knows, and inside a shard_map over such an axis, where arrays are local already.
    Raises ValueError for axes that are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    known = {axis for axes in AXES.values() for axis in axes}
    types = [
        kind
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if axis in known and mesh.shape[axis] > 1
    ]
    if AxisType.Explicit in types:
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise ValueError(
            "the axes of the mesh must be of type Auto: jax.make_mesh(..., axis_types="
            f"(AxisType.Auto,) * {len(kinds)}); got {kinds}"
        )
    return mesh if types and AxisType.Manual not in types else None


def axis_size(mesh: AbstractMesh | None, axis: str) -> int:
    """The number of devices along an axis; 1 without a mesh, or one that has no such axis."""
    return mesh.shape.get(axis, 1) if mesh is not None else 1


def time_parts() -> int:
    """The number of devices along time on the ambient mesh; 1 without one."""
    return axis_size(ambient_mesh(), SEQUENCE)


_parts_as_batch = contextvars.ContextVar("parts_as_batch", default=False)


@contextlib.contextmanager
def parts_as_batch() -> Iterator[None]:
    """A context in which the batch of ops is [parts of time x B]: each device computes its part of
    time as sequences of their own, and no state passes on."""
    token = _parts_as_batch.set(True)
    try:
        yield
    finally:
        _parts_as_batch.reset(token)


def in_context(layouts: tuple[str, ...]) -> tuple[str, ...]:
    """Layouts as they are inside `parts_as_batch`; themselves outside."""
    if not _parts_as_batch.get():
        return layouts
    # A part's time is whole, and so are its channels as far as time would cut them.
    inside = str.maketrans("BTC", "PLH")
    return tuple(layout.translate(inside) for layout in layouts)


def cutting_axes(mesh: AbstractMesh, letter: str, size: int) -> tuple[str, ...]:
    """The axes that cut a dimension of this letter and size."""
    if letter in "HG" and size == 1:
        return ()
    return tuple(axis for axis in AXES.get(letter, ()) if axis_size(mesh, axis) > 1)


def spec(op: str, mesh: AbstractMesh, layout: str, array: Any) -> P:
    """Where one array of an op lies. Raises ValueError for a dimension that its axes do not
    divide."""
    cuts = []
    for letter, size in zip(layout, array.shape, strict=True):
        if letter == "_":
            cuts.append(P.UNCONSTRAINED)
            continue
        axes = cutting_axes(mesh, letter, size)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"the {NAMES[letter]} of {op} must be a multiple of the mesh axes that"
                f" cut it, {over}; got {size}"
            )
        cuts.append(axes or None)
    return P(*cuts)


def specs(
    op: str, mesh: AbstractMesh, layouts: Sequence[str], values: Sequence[Any]
) -> tuple[Any, ...]:
    """Where each value lies, a tree of arrays of one layout; None for None."""
    return tuple(
        jax.tree.map(lambda array, layout=layout: spec(op, mesh, layout, array), value)
        for layout, value in zip(layouts, values, strict=True)
    )


def by_device(
    name: str,
    function: Callable[..., Any],
    layouts: Sequence[str],
    outputs: Sequence[str],
    shapes: Any = None,
) -> Callable[..., Any]:
    """`function` of arrays, trees of arrays or None, as each device computes it of its parts;
    without a mesh `function` itself.

    For an op whose inputs are made of few numbers, such as the parameters of a kernel: they are
    sent, and their gradients, which devices that share them add up, and nothing that is made of
    them. Ops inside run on the device's arrays. `name` is for messages; the layouts are those of
    arguments and results, a tuple. Where they cut time, the function itself exchanges what devices
    need of each other; as it then has a meaning on devices alone, the shapes of its results on the
    whole arrays have to be given."""
    mesh = ambient_mesh()
    if mesh is None:
        return function

    def on_devices(*values: Any) -> Any:
        inside, outside = in_context(tuple(layouts)), in_context(tuple(outputs))
        results = jax.eval_shape(function, *values) if shapes is None else shapes
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs(name, mesh, inside, values),
            out_specs=specs(name, mesh, outside, results),
            check_vma=False,
        )(*values)

    return on_devices


def constrain(array: jax.Array, layout: str) -> jax.Array:
    """The array, which the compiler lays out on the ambient mesh as its layout says; itself without
    a mesh."""
    mesh = ambient_mesh()
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, spec("array", mesh, layout, array))


def axes_of(specs: Any) -> set[str]:
    """All axes that occur in a tree of specs."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    cuts = [cut for leaf in leaves for cut in leaf if cut]
    return {axis for cut in cuts for axis in ((cut,) if isinstance(cut, str) else cut)}
