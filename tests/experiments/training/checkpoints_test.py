"""Checkpoints are checked when they are read: a damaged one is named, skipped, and kept."""

import functools
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P
from jax.sharding import AxisType

from experiments.training import checkpoints
from experiments.training.checkpoints import Best, Checkpoints, DamagedCheckpointError

BEST = Best("test/loss", "min")


def tree(step: int) -> dict[str, Any]:
    """Arrays of several types on a mesh; different at every step."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    arrays = {
        "matrix": jax.random.normal(jax.random.key(step), (64, 65)),
        "count": jnp.asarray(step, jnp.int32),
        "half": jnp.full((5,), step, jnp.bfloat16),
        "flag": jnp.asarray([True, False]),
        "key": jax.random.key(step),
        "empty": {},
    }
    return jax.device_put(arrays, NamedSharding(mesh, P()))


def wanted(**changes: Any) -> dict[str, Any]:
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree(0)
    )
    return {"model": shapes | changes}


def counter() -> grain.DatasetIterator[int]:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    data = counter()
    with Checkpoints(directory, keep=3, best=BEST) as saves:
        for step in (1, 2):
            next(data)
            saves.save(step, {"model": tree(step)}, data, {"test/loss": 1.0 / step})
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def assert_same(got: Any, step: int) -> None:
    numbers = functools.partial(
        jax.tree.map,
        lambda leaf: (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
    )
    jax.tree.map(np.testing.assert_array_equal, numbers(got), numbers(tree(step)))


def test_what_is_restored_is_what_was_saved(directory):
    data = counter()
    found = checkpoints.restore_latest(directory, wanted(), data)
    assert found is not None
    step, parts, damaged = found
    assert step == 2 and damaged == []
    assert_same(parts["model"], 2)
    assert next(data) == 2


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoints.restore_latest(tmp_path / "nothing", wanted(), counter()) is None


def largest_file(path: Path) -> Path:
    files = [
        file for file in path.rglob("*") if file.is_file() and file.name != "commit_success.txt"
    ]
    return max(files, key=lambda file: file.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("model/ocdbt.process_0/d", truncate),
        ("model/ocdbt.process_0/d", flip_a_bit),
        ("model/ocdbt.process_0/d", Path.unlink),
        ("model/d", truncate),
        ("data/d", truncate),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(directory, which, damage):
    damage(largest_file(directory / "2" / which))
    data = counter()
    found = checkpoints.restore_latest(directory, wanted(), data)
    assert found is not None
    step, parts, damaged = found
    assert step == 1 and len(damaged) == 1 and damaged[0].startswith(str(directory / "2"))
    assert_same(parts["model"], 1)
    assert next(data) == 1
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_a_changed_number_is_found_by_its_checksum(directory, monkeypatch):
    real = checkpoints.v1.load_checkpointables

    def corrupted(*args: Any) -> Any:
        loaded = real(*args)
        loaded["model"]["tree"]["matrix"] = loaded["model"]["tree"]["matrix"].at[1, 2].mul(1.00001)
        return loaded

    monkeypatch.setattr(checkpoints.v1, "load_checkpointables", corrupted)
    with pytest.raises(DamagedCheckpointError, match="wrong checksum of model array matrix"):
        checkpoints.restore(directory, 2, wanted())


def test_a_checksum_sees_the_order_of_the_numbers():
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    sums = {
        int(checkpoints._checksums(array[order]))
        for order in (np.s_[:], np.s_[::-1], np.s_[:, ::-1])
    }
    assert len(sums) == 3


def test_if_all_are_damaged_the_run_is_not_started_anew(directory):
    for step in ("1", "2"):
        truncate(largest_file(directory / step / "model"))
    with pytest.raises(ValueError, match=r"every checkpoint is damaged \(.*/2 .*; .*/1 "):
        checkpoints.restore_latest(directory, wanted(), counter())


def test_another_shape_is_a_mistake_not_damage(directory):
    matrix = jax.ShapeDtypeStruct((3, 5), jnp.float32, sharding=tree(0)["matrix"].sharding)
    with pytest.raises(
        ValueError,
        match=(r"model array matrix has shape \(64, 65\) in the checkpoint and shape \(3, 5\)"),
    ):
        checkpoints.restore_latest(directory, wanted(matrix=matrix), counter())
    with pytest.raises(ValueError, match="model array more has no such array in the checkpoint"):
        checkpoints.restore_latest(directory, wanted(more=matrix), counter())


def test_what_cannot_be_used_is_moved_aside_whole(directory):
    truncate(directory / "1" / "metrics" / "metrics")
    before = sorted(path.name for path in (directory / "2").rglob("*"))
    checkpoints.set_aside_unusable(directory.parent, newest=1)
    aside = directory.parent / "damaged_checkpoints"
    assert not list(directory.iterdir()) and sorted(path.name for path in aside.iterdir()) == [
        "1",
        "2",
    ]
    assert sorted(path.name for path in (aside / "2").rglob("*")) == before
    with Checkpoints(directory, keep=3, best=BEST) as saves:
        saves.save(2, {"model": tree(2)}, counter(), None)
    assert checkpoints.steps(directory) == [2]


def test_the_best_is_by_the_metrics_on_disk(directory):
    with Checkpoints(directory, keep=1, best=BEST) as saves:
        assert saves.is_best({"test/loss": 0.4}) and not saves.is_best({"test/loss": 0.6})
        assert not saves.is_best({"test/loss": float("nan")})
