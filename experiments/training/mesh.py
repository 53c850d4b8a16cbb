"""The device mesh of a run, and which axis of it every array is laid over.

    data        batch
    fsdp        batch; parameters and optimizer state (ZeRO-3: each device holds a part of every
                large parameter), or optimizer state alone (ZeRO-1: parameters are whole on every
                device)
    sequence    time
    tensor      heads and inner widths

Axis types are Auto: the compiler inserts the collectives. The replica axis of several seeds is
never sharded. Any axis
may span processes: which rows of a batch a process makes, and which part of time it hands to its
devices, follows from where the mesh puts its devices."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import NamedSharding, P
from jax.sharding import AxisType, Mesh

import ops
from experiments.training.config import MESH_AXES, Config

# Logical axis of a parameter -> mesh axis. Layers are never sharded: the scan over them slices that
# axis.
LOGICAL_AXIS_RULES = (
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocabulary", "tensor"),
    ("layers", None),
)
BATCH_AXES = ("data", "fsdp")
HOST_MEMORY = "pinned_host"


@contextlib.contextmanager
def traced_on(mesh: Mesh, config: Config) -> Iterator[None]:
    """What the programs of a run are traced in: its mesh, and how its ops run there."""
    with (
        jax.set_mesh(mesh),
        ops.sequence_method(config.mesh.sequence_method),
        ops.kernels(config.kernels),
    ):
        yield


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of all processes; one size may be -1: what the others
    leave.

    Raises ValueError if the sizes do not multiply to the number of devices, or if they do not go
    with the dimensions of a TPU slice."""
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in MESH_AXES]

    def text() -> str:
        return ", ".join(f"{a}={n}" for a, n in zip(MESH_AXES, shape, strict=True))

    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"config.mesh sizes must be positive, at most one of them -1 (the rest); got {text()}"
        )
    known = math.prod(size for size in shape if size != -1)
    whole = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(whole) != len(devices):
        raise ValueError(
            "config.mesh sizes must multiply to the number of devices,"
            f" {len(devices)}; got {text()}"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(whole), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        # jax lays every axis of a mesh over whole dimensions of the slice, so that its rings stay
        # rings.
        raise ValueError(
            "config.mesh sizes must each be a product of dimensions of the slice, every"
            f" dimension in one of them; got {text()}"
        ) from error


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises ValueError if one of the `accumulate` parts of the batch does not divide over data x
    fsdp."""
    data, fsdp = (mesh.shape[axis] for axis in BATCH_AXES)
    shards = accumulate * data * fsdp
    if batch_size % shards:
        raise ValueError(
            "config.batch_size must be a multiple of accumulate x mesh.data x mesh.fsdp"
            f" = {accumulate} x {data} x {fsdp} = {shards}; got {batch_size}"
        )


def check_host_memory(mesh: Mesh) -> None:
    """Raises ValueError if the devices do not reach memory of their host."""
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"config.optimizer.offload needs devices with the memory {HOST_MEMORY}; got"
            f" {device.device_kind} with {', '.join(kinds)}"
        )


def parameter_specs(
    mesh: Mesh, params: nnx.State, replicated_axis: bool, zero: int = 3
) -> dict[str, Any]:
    """PartitionSpecs of abstract parameters by their logical axis names, behind an unsharded
    replica axis if there is one; with zero=1 not over fsdp. Raises ValueError for a parameter whose
    size the mesh axis does not divide."""
    with nnx.logical_axis_rules(LOGICAL_AXIS_RULES):
        specs = nnx.to_pure_dict(nnx.get_partition_spec(params))

    def checked(path: Any, spec: P, param: jax.ShapeDtypeStruct) -> P:
        for size, axis in zip(param.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"config.mesh.{axis} must divide every parameter axis laid over it;"
                    f" got {mesh.shape[axis]} for parameter {parameter_name(path)} with"
                    f" shape {param.shape}"
                )
        laid = [None if zero == 1 and axis == "fsdp" else axis for axis in spec]
        return P(*[None] * replicated_axis, *laid)

    return jax.tree.map_with_path(
        checked, specs, nnx.to_pure_dict(params), is_leaf=lambda leaf: isinstance(leaf, P)
    )


def parameter_name(path: Any) -> str:
    """stack/period/0/mixer/kernel"""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(mesh: Mesh, specs: Any, memory_kind: str | None = None) -> Any:
    """NamedShardings for a tree of PartitionSpecs; memory_kind None is the devices' own."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec, memory_kind=memory_kind),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


def optimizer_specs(tx: optax.GradientTransformation, opt_state: Any, specs: Any) -> Any:
    """Moments lie like their parameters; counters are replicated.

    Where an optimizer of several leaves out a parameter, there is a MaskedNode instead of a moment.
    """

    def is_masked(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    return optax.tree_map_params(
        tx,
        lambda moment, spec: moment if is_masked(moment) else spec,
        opt_state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=is_masked,
    )


def check_lengths(mesh: Mesh, lengths: Mapping[str, int | None]) -> None:
    """Raises ValueError for the first of the named lengths that the sequence axis does not
    divide."""
    parts = mesh.shape["sequence"]
    for name, length in lengths.items():
        if length is None and parts > 1:
            raise ValueError(
                f"config.mesh.sequence must be 1 where batches have no time axis; got {parts} for"
                f" {name}"
            )
        if length is not None and length % parts:
            raise ValueError(
                "config.mesh.sequence must divide the length of every batch; got"
                f" {parts} for {name}, whose length is {length}"
            )


def replicated(mesh: Mesh, tree: Any) -> Any:
    """Arrays of this process, the same in all of them, whole on every device."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree
    )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch of which this process's devices hold a part, ascending."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    blocks = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[block] for block in blocks if block]))


def batch_specs(
    mesh: Mesh,
    shapes: Mapping[str, tuple[int, ...]],
    length: int | None,
    replicated_axis: bool = False,
) -> dict[str, P]:
    """PartitionSpecs of a batch's arrays [B, ...] ([R, B, ...] with a replica axis).

    Rows lie over data x fsdp; arrays whose next axis is `length`, that of time, lie over sequence
    with it. The others, such as the places of answers, are not worth cutting. None: nothing is cut
    along time."""
    lead = int(replicated_axis)
    cut = length is not None and mesh.shape["sequence"] > 1

    def spec(shape: tuple[int, ...]) -> P:
        has_time = cut and shape[lead + 1 : lead + 2] == (length,)
        return P(*[None] * lead, BATCH_AXES, *["sequence"] * has_time)

    return {name: spec(shape) for name, shape in shapes.items()}


def place_batch(
    mesh: Mesh,
    batch: Mapping[str, np.ndarray],
    batch_size: int,
    length: int | None,
    replicated_axis: bool = False,
) -> dict[str, jax.Array]:
    """Global arrays [B, ...] ([R, B, ...] with a replica axis) of a batch of which this process has
    `process_rows`, laid out as `batch_specs` says."""
    rows, lead = process_rows(mesh, batch_size), int(replicated_axis)
    shapes = {name: array.shape for name, array in batch.items()}
    specs = batch_specs(mesh, shapes, length, replicated_axis)

    def place(array: np.ndarray, spec: P) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[lead].indices(batch_size)
            own = slice(*np.searchsorted(rows, (start, stop)))
            return array[(*index[:lead], own, *index[lead + 1 :])]

        shape = (*array.shape[:lead], batch_size, *array.shape[lead + 1 :])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return {name: place(array, specs[name]) for name, array in batch.items()}
