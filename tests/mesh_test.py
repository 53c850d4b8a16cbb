"""The mesh decides where arrays lie and nothing else."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import AbstractMesh
from orbax.checkpoint import v1

from experiments import train
from experiments.configs import linear_attention
from experiments.mesh import check_lengths, make_mesh, optimizer_specs, parameter_specs
from experiments.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.task import find_task, lengths
from experiments.train_state import Blueprint, make_blueprint
from tests.processes import started, train_command

FILE = "linear_attention.py:mqar,smoke"
LM = {
    "steps": 4,
    "batch_size": 8,
    "log_every_steps": 1,
    "optimizer.warmup_steps": 0,
    "eval.every_steps": 4,
    "eval.examples": 12,
    "checkpoint.every_steps": 4,
    "model.width": 16,
    "model.depth": 1,
    "task.train": ((16, 2, 64),),
    "task.test": ((16, 2),),
    "eval.best_metric": "",
}


def lm_config(**overrides: Any) -> Any:
    config: Any = linear_attention.get_config("mqar,smoke")
    config.update_from_flattened_dict(LM | overrides)
    return config


def assert_same_metrics(one: Path, other: Path) -> None:
    """Equal up to the order of sums."""
    rows, others = (
        [json.loads(line) for line in (path / "metrics.jsonl").open()]
        for path in (one, other)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, again in zip(rows, others, strict=True):
        for name in row:
            if not name.startswith("speed/"):
                np.testing.assert_allclose(
                    again[name],
                    row[name],
                    rtol=2e-5,
                    err_msg=f"{name} at {row['step']}",
                )


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config = lm_config()
    options = config.task.to_dict()
    return make_blueprint(config, find_task(options.pop("name"), options))


def abstract_mesh(data: int, fsdp: int, sequence: int = 1) -> Any:
    axes = ("data", "fsdp", "sequence", "tensor")
    return AbstractMesh((data, fsdp, sequence, 1), axes)


def test_parameters_are_laid_over_fsdp_by_their_logical_names(blueprint):
    specs = parameter_specs(
        abstract_mesh(2, 4), blueprint.params, replicated_axis=False
    )
    assert specs["embedding"]["embedding"] == P("tensor", "fsdp")
    assert specs["stack"]["period"][0]["mixer_norm"]["scale"] == P(None, "fsdp")
    stacked = parameter_specs(
        abstract_mesh(2, 4), blueprint.params, replicated_axis=True
    )
    assert stacked["embedding"]["embedding"] == P(None, "tensor", "fsdp")


def test_moments_lie_like_their_parameters(blueprint):
    options = lm_config().optimizer
    tx = make_optimizer(
        options, make_schedule(options, 4), parameter_groups(blueprint.params)
    )
    specs = parameter_specs(
        abstract_mesh(2, 4), blueprint.params, replicated_axis=False
    )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        jax.tree.leaves(blueprint.params),
    )
    params = jax.tree.unflatten(
        jax.tree.structure(specs, is_leaf=lambda leaf: isinstance(leaf, P)), shapes
    )
    state = optimizer_specs(tx, jax.eval_shape(tx.init, params), specs)
    adam = state.inner_state[1][0]
    assert adam.mu == specs and adam.nu == specs and adam.count == P()


def test_a_size_that_does_not_divide_is_refused_by_the_parameters_name(blueprint):
    with pytest.raises(
        ValueError,
        match=(
            r"config.mesh.fsdp must divide .* got 3 for parameter .*embed.* \(64, 16\)"
        ),
    ):
        parameter_specs(abstract_mesh(1, 3), blueprint.params, replicated_axis=False)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"mesh.data x mesh.fsdp = 4 x 2 = 8; got 12"):
        make_mesh({"data": -1, "fsdp": 2, "sequence": 1, "tensor": 1}, 12)


def test_a_length_that_the_sequence_axis_does_not_divide_is_refused_by_its_name():
    task = find_task(
        "mqar", {"train": ((16, 2, 64), (24, 2, 64)), "test": ((16, 2), (36, 2))}
    )
    check_lengths(abstract_mesh(1, 1, sequence=4), lengths(task, seed=0))
    with pytest.raises(
        ValueError,
        match=r"config.mesh.sequence must divide .* got 8 for evaluation length_36_.* whose length is 36",
    ):
        check_lengths(abstract_mesh(1, 1, sequence=8), lengths(task, seed=0))


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes_with_sharded_parameters(tmp_path):
    sharded = LM | {"mesh.data": 2, "mesh.fsdp": 4}
    command = train_command(FILE, tmp_path / "eight", sharded)
    with started([command], tmp_path / "logs", devices=8) as [child]:
        train.run(lm_config(), tmp_path / "one", quiet=True)
        child.succeed()
    assert_same_metrics(tmp_path / "one", tmp_path / "eight")
    stored: Any = v1.metadata(
        str(tmp_path / "eight/checkpoints/4"), checkpointable_name="model"
    ).metadata
    embedding = stored["tree"]["params"]["embedding"]["embedding"]
    assert (
        embedding.shape == (64, 16)
        and embedding.storage_metadata.write_shape[1] == 16 // 4
    )
