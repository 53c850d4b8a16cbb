"""Time and memory of a network of point clouds, for tables."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.tables.computations.rounds import fastest
from models.networks import point_cloud

GRID = (256, 256, 16)
OPERATORS: dict[str, dict[str, Any]] = {
    "mamba": {
        "pattern": ("lion",),
        "mixers": {"lion": {"operator": "mamba"}},
        "branch_norm": True,
        "mlp": "none",
    },
    "retnet": {"pattern": ("lion",), "mlp": "gelu"},
    "gla": {"pattern": ("gla",), "mixers": {"gla": {"heads": 2}}, "mlp": "gelu"},
    "softmax": {
        "pattern": ("transformer",),
        "mixers": {"transformer": {"heads": 2}},
        "mlp": "gelu",
    },
    "none": {"pattern": ("lion",), "orders": ()},
}


def by_voxels(*, seed: int, operator: str, voxels: int, group: int) -> dict[str, dict[str, float]]:
    """{"cloud": {"ms", "mib"}} of the logits of all voxels of one cloud in float32: one block of
    width 32 and the last layer; the fastest of a few rounds, and the memory for what is computed on
    the way. group: 0 for the whole cloud."""
    windows = ((13, 13, 16), (13, 13, 8))
    config = {
        "width": 32,
        "windows": windows,
        "groups": (group or 2 * voxels,) * 2,
        "norm": "layer",
    }
    model: Any = point_cloud.build(
        config | OPERATORS[operator],
        classes=9,
        channels=4,
        grid_x=GRID[0],
        grid_y=GRID[1],
        grid_z=GRID[2],
        clouds=1,
        per_voxel=1,
        rngs=nnx.Rngs(seed),
        param_dtype="float32",
        compute_dtype="float32",
    )
    model.eval()
    graphdef, state = nnx.split(model)

    def logits(state: Any, features: jax.Array, **places: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(features, **places)

    cloud = _cloud(seed, voxels)
    compiled: Any = jax.jit(logits).lower(state, cloud[0], **cloud[1]).compile()
    seconds = fastest(lambda: compiled(state, cloud[0], **cloud[1]), rounds=3)
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {"cloud": {"ms": 1e3 * seconds, "mib": mib}}


def _cloud(seed: int, voxels: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features, and coordinates and the cloud's number, of voxels of a rough surface, one or two
    above each other."""
    random = np.random.default_rng(seed)
    columns = random.choice(GRID[0] * GRID[1], -(-voxels // 2), replace=False)
    x, y = np.unravel_index(np.repeat(columns, 2)[:voxels], GRID[:2])
    height = 7 + 3 * np.sin(x / 9) + 3 * np.cos(y / 7)
    z = height.astype(int) + np.arange(voxels) % 2
    places = np.stack([x, y, z], axis=1).astype(np.int32)
    features = random.standard_normal((1, voxels, 4)).astype(np.float32)
    return features, {"coordinates": places[None], "segment_ids": np.zeros((1, voxels), np.int32)}
