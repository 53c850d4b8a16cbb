"""A network over packed voxels: clouds never meet, and what is no voxel does not count."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.networks.point_cloud import build

GRID, CLOUDS, CHANNELS, T = (8, 8, 4), 3, 2, 48
COUNTS = (14, 9, 17)
MODEL: dict[str, Any] = {
    "width": 8,
    "windows": ((3, 3, 4), (3, 3, 2)),
    "groups": (5, 4),
    "pattern": ("lion",),
    "mixers": {"lion": {"heads": 2}},
    "mlp": "none",
    "norm": "layer",
}


def network(per_voxel: bool, **options: Any) -> Any:
    built = build(
        MODEL | options,
        classes=5,
        channels=CHANNELS,
        grid_x=GRID[0],
        grid_y=GRID[1],
        grid_z=GRID[2],
        clouds=CLOUDS,
        per_voxel=per_voxel,
        rngs=nnx.Rngs(0),
        param_dtype="float32",
        compute_dtype="float32",
    )
    built.eval()
    return built


@jax.jit
def logits(model: Any, row: dict[str, np.ndarray]) -> jax.Array:
    row = {name: array[None] for name, array in row.items()}
    return model(row.pop("voxels"), **row)[0]


def packed(chosen: tuple[int, ...], seed: int, junk: float) -> dict[str, np.ndarray]:
    """A row with the chosen clouds, its places in an order of its own; where there is no voxel,
    junk."""
    cells = np.random.default_rng(5)
    order = np.random.default_rng(seed).permutation(T)
    row: dict[str, Any] = {
        "voxels": np.full((T, CHANNELS), junk, np.float32),
        "coordinates": np.full((T, 3), 77, np.int32),
        "segment_ids": np.zeros(T, np.int32),
        "mask": np.zeros(T, bool),
    }
    first = 0
    for cloud, count in enumerate(COUNTS):
        number = cells.choice(math.prod(GRID), count, replace=False)
        values = cells.standard_normal((count, CHANNELS))
        if cloud not in chosen:
            continue
        rows = order[first : first + count]
        row["voxels"][rows], row["segment_ids"][rows], row["mask"][rows] = values, cloud, True
        row["coordinates"][rows] = np.stack(np.unravel_index(number, GRID), axis=1)
        first += count
    return row


def by_place(row: dict[str, np.ndarray], cloud: int, logits_TC: Any) -> np.ndarray:
    """Logits of a cloud's voxels in the order of their cells."""
    own = np.flatnonzero((row["segment_ids"] == cloud) & row["mask"])
    return np.asarray(logits_TC)[own[np.lexsort(row["coordinates"][own].T)]]


@pytest.mark.slow
def test_a_voxel_sees_nothing_of_other_clouds_of_padding_or_of_its_place_in_the_row() -> None:
    model = network(True)
    alone, together = packed((1,), 0, junk=np.nan), packed((0, 1, 2), 1, junk=0.5)
    want = by_place(alone, 1, logits(model, alone))
    got = by_place(together, 1, logits(model, together))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    assert np.abs(got - got.mean(axis=0)).max() > 0.01

    moved = packed((0, 1, 2), 1, junk=0.5)
    other = np.flatnonzero((moved["segment_ids"] == 2) & moved["mask"])[0]
    moved["voxels"][other] += 1
    changed = logits(model, moved)
    np.testing.assert_allclose(by_place(moved, 1, changed), got, atol=1e-6, rtol=0)
    # And within a cloud they do see each other.
    rest = np.delete(np.asarray(changed - logits(model, together)), other, axis=0)
    assert np.abs(rest).max() > 1e-3


@pytest.mark.full
def test_a_cloud_has_the_logits_that_it_has_alone_and_gradients_are_finite() -> None:
    model = network(False, fill_groups=True, pattern=("gla", "lion"), mixers={"gla": {"heads": 1}})
    alone, together = packed((1,), 0, junk=np.nan), packed((0, 1, 2), 1, junk=0.5)
    want, got = logits(model, alone)[1], logits(model, together)
    assert got.shape == (CLOUDS, 5)
    np.testing.assert_allclose(got[1], want, atol=2e-5 * float(abs(want).max()), rtol=0)

    def loss(model: Any) -> jax.Array:
        return jnp.sum(logits(model, alone)[1] ** 2)

    grads = nnx.state(jax.jit(jax.grad(loss, allow_int=True))(model), nnx.Param)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": (5,)}, "windows and groups must have one entry for each block"),
        ({"orders": ("x", "z")}, "orders, each must be one of 'x', 'y', 'random'; got 'z'"),
        ({"windows": ((3, 3, 0), (3, 3, 2))}, r"config.model.windows must be a tuple"),
        ({"windows": ((3000, 3000, 30),) * 2}, r"window \(3000, 3000, 30\) gives keys of 2\^31"),
        ({"pattern": ()}, r"pattern must name a mixer; got \(\)"),
        ({"pattern": ("line",)}, "a mixer of model.pattern .* got 'line'"),
        ({"mixers": {"lion": {"head": 1}}}, "mixer lion has no option 'head'"),
        ({"depth": 2}, "model point_cloud has no option 'depth'"),
        ({"pre_norm": False, "branch_norm": True}, "branch_norm must be False"),
    ],
)
def test_options_that_mean_nothing_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: network(True, **options))


def test_arrays_of_other_shapes_are_refused() -> None:
    model: Any = nnx.eval_shape(lambda: network(True))
    voxels, row = np.zeros((1, T, CHANNELS)), np.zeros((1, T), np.int32)
    with pytest.raises(ValueError, match=r"features must be \[B, T, 2\]; got \(1, 48, 3\)"):
        model(np.zeros((1, T, 3)), coordinates=np.zeros((1, T, 3)), segment_ids=row)
    with pytest.raises(
        ValueError, match=r"coordinates and segment_ids must be .* got \(1, 48, 2\)"
    ):
        model(voxels, coordinates=np.zeros((1, T, 2)), segment_ids=row)
