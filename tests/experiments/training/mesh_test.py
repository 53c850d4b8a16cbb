"""The mesh, and what saves memory, decide where arrays lie and nothing else."""

import functools
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import AbstractMesh
from orbax.checkpoint import v1

from experiments import train
from experiments.configs import linear_attention, linear_self_attention
from experiments.training import checkpoints
from experiments.training.batches import train_batches
from experiments.training.hyperparameters import Hyperparameters, hyperparameters
from experiments.training.mesh import (
    check_batch_size,
    check_host_memory,
    check_lengths,
    make_mesh,
    optimizer_specs,
    parameter_specs,
)
from experiments.training.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.training.run_loading import load_run
from experiments.training.state import (
    Blueprint,
    initial_state,
    make_blueprint,
    seed_array,
    state_specs,
    sum_names,
)
from experiments.training.step import make_step
from experiments.training.task import find_task, lengths
from tests.support.processes import started, train_command

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


def regression_config(**overrides: Any) -> Any:
    config: Any = linear_self_attention.get_config("icl_regression,smoke")
    options = {"steps": 4, "batch_size": 8, "log_every_steps": 1, "eval.examples": 12}
    config.update_from_flattened_dict(options | overrides)
    return config


def lm_config(**overrides: Any) -> Any:
    config: Any = linear_attention.get_config("mqar,smoke")
    config.update_from_flattened_dict(LM | overrides)
    return config


def assert_same_metrics(one: Path, other: Path) -> None:
    """Equal up to the order of sums."""
    rows, others = (
        [json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (one, other)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, again in zip(rows, others, strict=True):
        for name in row:
            if not name.startswith("speed/"):
                np.testing.assert_allclose(
                    again[name], row[name], rtol=2e-5, err_msg=f"{name} at {row['step']}"
                )


def assert_same_parameters(one: Path, other: Path) -> None:
    """Equal up to the order of sums, of which Adam makes a thousandth of a step (of 0.01) where a
    gradient is small."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, load_run(other).params, load_run(one).params)


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config = lm_config()
    options = config.task.to_dict()
    return make_blueprint(config, find_task(options.pop("name"), options))


def numbers_of(options: Any) -> Hyperparameters:
    return hyperparameters(options, make_schedule(options, 4), 4)


def abstract_mesh(data: int, fsdp: int, sequence: int = 1) -> Any:
    axes = ("data", "fsdp", "sequence", "tensor")
    return AbstractMesh((data, fsdp, sequence, 1), axes)


def test_parameters_are_laid_over_fsdp_by_their_logical_names(blueprint):
    specs = parameter_specs(abstract_mesh(2, 4), blueprint.params, replicated_axis=False)
    assert specs["embedding"]["embedding"] == P("tensor", "fsdp")
    assert specs["stack"]["period"][0]["mixer_norm"]["scale"] == P(None, "fsdp")
    stacked = parameter_specs(abstract_mesh(2, 4), blueprint.params, replicated_axis=True)
    assert stacked["embedding"]["embedding"] == P(None, "tensor", "fsdp")


def test_moments_lie_like_their_parameters(blueprint):
    options = lm_config().optimizer
    tx = make_optimizer(options, numbers_of(options), parameter_groups(blueprint.params))
    specs = parameter_specs(abstract_mesh(2, 4), blueprint.params, replicated_axis=False)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), jax.tree.leaves(blueprint.params)
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
        match=(r"config.mesh.fsdp must divide .* got 3 for parameter .*embed.* \(64, 16\)"),
    ):
        parameter_specs(abstract_mesh(1, 3), blueprint.params, replicated_axis=False)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = abstract_mesh(4, 2)
    check_batch_size(mesh, 16, 2)
    with pytest.raises(ValueError, match=r"accumulate x .* = 1 x 4 x 2 = 8; got 12"):
        check_batch_size(mesh, 12, 1)


def test_zero_1_lays_moments_over_fsdp_and_parameters_not(blueprint):
    mesh = abstract_mesh(2, 4)
    options = lm_config().optimizer
    tx = make_optimizer(options, numbers_of(options), parameter_groups(blueprint.params))
    state = jax.eval_shape(lambda: initial_state(blueprint, tx, ("loss_sum",), seed_array((0,))))
    whole = state_specs(mesh, blueprint, tx, state, zero=1)
    parts = state_specs(mesh, blueprint, tx, state, zero=3)
    assert whole.params["embedding"]["embedding"] == P("tensor", None)
    assert parts.params["embedding"]["embedding"] == P("tensor", "fsdp")
    assert whole.opt_state == parts.opt_state


def test_a_batch_in_parts_is_one_batch():
    config = regression_config(**{"optimizer.clip_norm": 0.5})
    options = config.task.to_dict()
    task = find_task(options.pop("name"), options)
    blueprint = make_blueprint(config, task)
    batch = next(train_batches(task, seeds=(0,), batch_size=8))
    # Parts of unequal weight; rows 2 and 6, of four parts the third, have none.
    weights = np.array([1, 0.3, 0, 2, 0, 0.5, 0, 1], np.float32)
    batch["weights"] = weights
    numbers, groups = numbers_of(config.optimizer), parameter_groups(blueprint.params)

    def optimizer(numbers: Hyperparameters) -> Any:
        return make_optimizer(config.optimizer, numbers, groups)

    sums = sum_names(blueprint, task.objective, batch)
    arguments = (blueprint, task.objective, optimizer, groups)
    start = jax.jit(lambda: initial_state(blueprint, optimizer(numbers), sums, numbers.seeds))()
    whole = jax.jit(make_step(*arguments))(start, batch, 1, numbers)
    parts = jax.jit(make_step(*arguments, accumulate=4))(start, batch, 1, numbers)
    assert float(whole.window["gradient_norm"]) > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, parts, whole)


def test_devices_without_host_memory_are_refused():
    memories = [SimpleNamespace(kind="device")]
    device = SimpleNamespace(addressable_memories=lambda: memories, device_kind="Abacus")
    mesh: Any = SimpleNamespace(local_devices=[device])
    with pytest.raises(
        ValueError, match=r"config.optimizer.offload needs .* pinned_host; got Abacus with device"
    ):
        check_host_memory(mesh)
    check_host_memory(make_mesh(lm_config().mesh))


def test_a_length_that_the_sequence_axis_does_not_divide_is_refused_by_its_name():
    task = find_task("mqar", {"train": ((16, 2, 64), (24, 2, 64)), "test": ((16, 2), (36, 2))})
    check_lengths(abstract_mesh(1, 1, sequence=4), lengths(task, seed=0))
    message = "must divide .* got 8 for evaluation length_36_.* whose length is 36"
    with pytest.raises(ValueError, match=f"config.mesh.sequence {message}"):
        check_lengths(abstract_mesh(1, 1, sequence=8), lengths(task, seed=0))


@pytest.mark.slow
def test_moments_in_host_memory_change_no_number(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            train.Interruption, "at", lambda _, step: signal.SIGTERM if step == 2 else None
        )
        train.run(regression_config(**{"optimizer.offload": True}), tmp_path / "saving", quiet=True)
    lying = []
    real = checkpoints.Checkpoints.save

    def save(self: Any, step: int, parts: Any, *rest: Any) -> None:
        leaves = jax.tree.leaves(parts["optimizer"]["opt_state"])
        lying.append({leaf.sharding.memory_kind for leaf in leaves})
        real(self, step, parts, *rest)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    train.run(regression_config(**{"optimizer.offload": True}), tmp_path / "saving", quiet=True)
    train.run(regression_config(), tmp_path / "plain", quiet=True)
    assert lying == [{"pinned_host"}, {"device"}]
    assert_same_metrics(tmp_path / "plain", tmp_path / "saving")


LAYOUTS = [
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2},
    {"mesh.fsdp": 4, "mesh.tensor": 2},
    {"mesh.sequence": 4, "mesh.tensor": 2, "seeds": (0, 1)},
    {"mesh.fsdp": 8, "mesh.zero": 1, "optimizer.offload": True},
]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.full if place else pytest.mark.slow)
        for place, layout in enumerate(LAYOUTS)
    ],
)
def test_eight_devices_compute_what_one_computes_with_arrays_in_parts(tmp_path, layout):
    seeds = {"seeds": layout.get("seeds", (0,))}
    command = train_command(FILE, tmp_path / "eight", LM | layout)
    with started([command], tmp_path / "logs", devices=8) as [child]:
        train.run(lm_config(**seeds), tmp_path / "one", quiet=True)
        child.succeed()
    assert_same_metrics(tmp_path / "one", tmp_path / "eight")
    stored: Any = v1.metadata(
        str(tmp_path / "eight/checkpoints/4"), checkpointable_name="model"
    ).metadata
    embedding = stored["tree"]["params"]["embedding"]["embedding"].storage_metadata
    over_fsdp = layout.get("mesh.fsdp", 1) if layout.get("mesh.zero", 3) == 3 else 1
    assert embedding.write_shape[-1] == 16 // over_fsdp
    # One process of one device reads what eight devices wrote.
    assert_same_parameters(tmp_path / "one", tmp_path / "eight")


@pytest.mark.full
def test_eight_devices_evaluate_and_continue_prompts_as_one_does(tmp_path):
    summary = train.run(lm_config(), tmp_path / "run", quiet=True)
    module = [sys.executable, "-m"]
    run = f"--workdir={tmp_path / 'run'}"
    prompts = ["--prompt=3 14 15", "--prompt=7", "--tokens=5", "--temperature=0"]
    evaluation = [*module, "experiments.evaluate", run, "--json"]
    with started([evaluation], tmp_path / "evaluation", devices=8) as [child]:
        child.succeed()
    result = json.loads(child.printed.splitlines()[-1])
    assert result["decode_max_abs_difference"] < 1e-5
    [found], [expected] = (
        part.values() for part in (result["evaluations"], summary["evaluations"])
    )
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    printed = []
    for devices in (1, 8):
        generation = [*module, "experiments.generate", run, *prompts]
        logs = tmp_path / f"generation_{devices}"
        with started([generation], logs, devices=devices) as [child]:
            child.succeed()
        printed.append(child.printed)
    assert printed[0] == printed[1] and printed[0].startswith("3 14 15 ")
