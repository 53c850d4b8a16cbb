"""A mesh of eight devices, and what a program sends between them."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_of(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def collectives(function: Any, *arrays: Any) -> dict[str, list[str]]:
    """Kinds of collectives in the compiled program, and the shapes of their results."""
    program = jax.jit(function).lower(*arrays).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found: dict[str, list[str]] = {}
    for shape, kind in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program):
        found.setdefault(kind, []).append(shape)
    return found
