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
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import NamedSharding, P
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

import ops
from experiments.training.config import MESH_AXES, Config
from experiments.training.task import batch_length

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


def join_processes(heartbeat_timeout_seconds: int) -> None:
    """Joins the other processes of this run, if the environment says that there are any.

    That is: JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm
    step of several tasks, or a TPU slice of several hosts. To be called before anything asks jax
    for devices. From then on a process that gives no sign of life for `heartbeat_timeout_seconds`
    is lost, and jax aborts all others, however deep in a collective they wait for it; the same
    command then goes on from the last checkpoint."""
    variables = os.environ
    if (
        "JAX_COORDINATOR_ADDRESS" in variables
        or "MEGASCALE_COORDINATOR_ADDRESS" in variables
        or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in variables.get("TPU_WORKER_HOSTNAMES", "")
    ):
        count, place = (variables.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(place) if place else None,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )


def wait_for_all_processes(place: str) -> None:
    """Returns when every process has come to this `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


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


def check_lengths(mesh: Mesh, lengths: Mapping[str, int]) -> None:
    """Raises ValueError for the first of the named lengths that the sequence axis does not
    divide."""
    parts = mesh.shape["sequence"]
    for name, length in lengths.items():
        if length % parts:
            raise ValueError(
                "config.mesh.sequence must divide the length of every batch; got"
                f" {parts} for {name}, whose length is {length}"
            )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch of which this process's devices hold a part, ascending."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    blocks = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[block] for block in blocks if block]))


def place_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int, replicated_axis: bool = False
) -> dict[str, jax.Array]:
    """Global arrays [B, ...] ([R, B, ...] with a replica axis) of a batch of which this process has
    `process_rows`.

    Rows lie over data x fsdp; arrays with a time axis, as long as the sequences that the model
    reads, lie over sequence with it. The others, such as the places of answers, are not worth
    cutting."""
    rows, lead = process_rows(mesh, batch_size), int(replicated_axis)
    length = batch_length(batch, axis=lead + 1) if mesh.shape["sequence"] > 1 else None

    def place(array: np.ndarray) -> jax.Array:
        has_time = length is not None and array.shape[lead + 1 : lead + 2] == (length,)
        spec = P(*[None] * lead, BATCH_AXES, *["sequence"] * has_time)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[lead].indices(batch_size)
            own = slice(*np.searchsorted(rows, (start, stop)))
            return array[(*index[:lead], own, *index[lead + 1 :])]

        shape = (*array.shape[:lead], batch_size, *array.shape[lead + 1 :])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return {name: place(array) for name, array in batch.items()}
