"""Devices of TPUs that are not there, as the TPU's own compiler takes them."""

import importlib.util
import os
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.compiled.hardware import Slice

# libtpu asks these where it is; there is no TPU, and it is told so rather than left to complain.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# The smallest slices of each generation that libtpu takes by this name.
SMALLEST = {
    "v6e": "v6e:2x2",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v4": "v4:2x2x1",
    "tpu7x": "tpu7x:2x2x1",
}


def tpu_devices(where: Slice) -> list[Any]:
    """Devices of the slice, one a chip, to compile for. Raises ValueError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            'planning needs the TPU compiler: pip install "scanax[aot]" (Linux x86-64)'
        )
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if where.size == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if where.chip.name == "v4":
        # Its two cores as one device, as on a TPU; without this the compiler takes them for two.
        options["chip_config_name"] = "megacore"
    topology = topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options)
    return list(topology.devices)


def one_device_mesh(generation: str) -> Mesh:
    """A mesh of one device of a generation, to compile kernels for (of v4 and tpu7x one core)."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=SMALLEST[generation])
    return Mesh(np.array(topology.devices[:1]), ("device",))
