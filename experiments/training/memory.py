"""How much memory there is, and whether a run can fit: asked before anything is allocated, so that
a size that nobody meant costs one line and not the machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.training.config import Config, flatten
from experiments.training.program import Program, shard_bytes

# What a container may use, in the second and the first version of Linux' control groups.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes() -> int:
    """Memory of this machine, or of the container if that may use less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in map(Path, CONTAINER_LIMITS):
        text = file.read_text().strip() if file.exists() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def check_held(what: str, size_bytes: int) -> None:
    """Raises ValueError, beginning with `what`, if a task is to hold more than the host's
    memory."""
    there = host_memory_bytes()
    if size_bytes > there:
        raise ValueError(
            f"{what} must fit into the {there / 2**30:,.1f} GiB of this machine; got arrays of"
            f" {size_bytes / 2**30:,.1f} GiB"
        )


def device_memory_bytes(device: Any) -> int:
    """Memory of a device; where it is the host's, this device's share of it."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", host_memory_bytes() // jax.local_device_count())


def check_memory(program: Program) -> None:
    """Raises ValueError if a device cannot hold the state of a run, the gradients and a batch: the
    least of what a step needs."""
    device = program.mesh.local_devices[0]
    held = {
        "parameters and state": shard_bytes(program.state),
        "gradients": shard_bytes(program.state.params),
        "batch": shard_bytes(program.batch),
    }
    there = device_memory_bytes(device)
    if sum(held.values()) > there:
        parts = ", ".join(f"{what} {size / 2**30:,.1f} GiB" for what, size in held.items())
        raise ValueError(
            f"a step needs more memory than the {there / 2**30:,.1f} GiB that {device.device_kind}"
            f" has: {parts}; the largest sizes of the config are {largest_sizes(program.config)}"
        )


def largest_sizes(config: Config, count: int = 3) -> str:
    """ "config.batch_size=1000, ...": the `count` largest integers among what gives arrays their
    shapes."""
    sizes = {
        key: max(_integers(value), default=0)
        for key, value in flatten(config)
        if key == "batch_size" or key.split(".")[0] in ("model", "task")
    }
    largest = sorted(sizes, key=lambda key: -sizes[key])[:count]
    return ", ".join(f"config.{key}={sizes[key]}" for key in largest)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int):
        yield int(value)
