"""Several processes hold one run: its data, its parameters, its checkpoints; and lose it
together."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from experiments import train
from experiments.training import checkpoints
from experiments.training.batches import train_batches
from experiments.training.config import MESH_AXES
from experiments.training.mesh import make_mesh, place_batch, process_rows
from experiments.training.processes import join_processes
from experiments.training.run_record import check_same_everywhere
from experiments.training.task import find_task
from tests.experiments.training.mesh_test import (
    FILE,
    LM,
    assert_same_metrics,
    assert_same_parameters,
    lm_config,
    regression_config,
)
from tests.support.processes import started, train_command

# (data, fsdp, sequence, tensor) over two processes of four devices. In the first, rows and time lie
# within a process; in the others processes share rows, time, or both.
MESHES = ((2, 2, 2, 1), (1, 1, 8, 1), (1, 2, 4, 1), (1, 1, 1, 8), (1, 1, 2, 4))
REGRESSION = "linear_self_attention.py:icl_regression,smoke"
# Prompts of 20 columns, which two parts of time share.
SHORT = {
    "task.examples": 19,
    "steps": 4,
    "batch_size": 8,
    "log_every_steps": 1,
    "eval.every_steps": 4,
    "eval.examples": 12,
}
# So many steps that a process can be lost among them.
LONG = SHORT | {
    "steps": 120,
    "log_every_steps": 30,
    "eval.every_steps": 120,
    "checkpoint.every_steps": 30,
}


def compare_batches_and_configs() -> None:
    """In each of two processes: global arrays are those that one process makes, and a config that
    differs is named."""
    join_processes(heartbeat_timeout_seconds=100)
    task = find_task("mqar", {"train": ((16, 2, 64),), "test": ((16, 2),)})
    for sizes, seeds in [(MESHES[0], (3,)), *((sizes, (0, 1)) for sizes in MESHES)]:
        mesh = make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
        rows = process_rows(mesh, 8)
        assert len(rows) == 8 // min(sizes[0] * sizes[1], 2), (sizes, rows)
        expected = next(train_batches(task, seeds=seeds, batch_size=8))
        own = next(train_batches(task, seeds=seeds, batch_size=8, rows=rows))
        placed: Any = place_batch(mesh, own, 8, 16, replicated_axis=len(seeds) > 1)
        assert ("sequence" in placed["tokens"].sharding.spec) == (sizes[2] > 1)
        for name, array in placed.items():
            gathered = multihost_utils.process_allgather(array, tiled=True)
            np.testing.assert_array_equal(gathered, expected[name], err_msg=name)
    check_same_everywhere(Path("/run"), regression_config())
    own_lr = (0.01, 0.125)[jax.process_index()]
    message = "alike; got config.optimizer.lr: 0.01 in process 0, 0.125 in process 1$"
    with pytest.raises(ValueError, match=message):
        check_same_everywhere(Path("/run"), regression_config(**{"optimizer.lr": own_lr}))


@pytest.mark.slow
def test_two_processes_place_the_batch_of_one_on_any_mesh_and_refuse_other_configs(tmp_path):
    code = f"from {__name__} import compare_batches_and_configs as run; run()"
    command = [sys.executable, "-c", code]
    with started([command] * 2, tmp_path / "logs", devices=4) as children:
        for child in children:
            child.succeed()


@pytest.mark.parametrize(
    ("file", "options", "config", "sizes"),
    [
        pytest.param(REGRESSION, SHORT, regression_config, (2, 2, 2, 1), marks=pytest.mark.slow),
        pytest.param(FILE, LM, lm_config, (2, 2, 2, 1), marks=pytest.mark.full),
        pytest.param(FILE, LM, lm_config, (1, 1, 4, 2), marks=pytest.mark.full),
    ],
    ids=["regression", "language model", "language model whose time spans processes"],
)
def test_two_processes_go_on_with_what_one_began_and_compute_what_one_computes(
    tmp_path, file, options, config, sizes
):
    one, two = tmp_path / "one", tmp_path / "two"
    begun = options | {"checkpoint.every_steps": 2, "accumulate": 2}
    train.run(config(**begun), one, quiet=True)
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("4", "summary.json"))
    assert checkpoints.steps(two / "checkpoints") == [2]
    laid = {f"mesh.{axis}": n for axis, n in zip(MESH_AXES, sizes, strict=True)}
    command = train_command(file, two, begun | laid | {"optimizer.offload": True})
    with started([command] * 2, tmp_path / "logs", devices=4) as children:
        for child in children:
            child.succeed()
    assert_same_metrics(one, two)
    [continued] = json.loads((two / "run.json").read_text())["continued"]
    assert continued["process_count"] == 2 and continued["step"] == 2
    # One process reads the checkpoint of two.
    assert_same_parameters(one, two)


@pytest.mark.full
def test_processes_started_with_different_configs_all_stop_and_name_what_differs(tmp_path):
    commands = [
        train_command(REGRESSION, tmp_path / "run", {"steps": 4, "optimizer.lr": lr})
        for lr in (0.01, 0.02)
    ]
    with started(commands, tmp_path / "logs") as children:
        for child in children:
            assert child.wait() == 1
            assert (
                "error: all processes of a run must be started alike; got"
                " config.optimizer.lr: 0.01 in process 0, 0.02 in process 1\n"
            ) in child.printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    workdir, timeout = tmp_path / "run", 10
    overrides = LONG | {"heartbeat_timeout_seconds": timeout}
    laid = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.sequence": 2}
    command = train_command(REGRESSION, workdir, overrides | laid)
    with started([command] * 2, tmp_path / "logs", devices=4) as children:
        lost, left = children[::-1]
        lost.wait_until(lambda: checkpoints.steps(workdir / "checkpoints"))
        assert left.process.poll() is None, left.printed
        lost.process.kill()
        killed = time.monotonic()
        # By the service of jax or by a collective whose peer is gone, whichever sees it first.
        assert left.wait(60) == -signal.SIGABRT, left.printed
        assert time.monotonic() - killed < timeout + 10
    done = checkpoints.steps(workdir / "checkpoints")[-1]
    assert 0 < done < overrides["steps"], "the run was over before the process was lost"
    train.run(regression_config(**overrides), tmp_path / "whole", quiet=True)
    train.run(regression_config(**overrides), workdir, quiet=True)
    assert_same_metrics(tmp_path / "whole", workdir)
