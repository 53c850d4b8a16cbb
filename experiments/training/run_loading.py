"""A trained run, read back from its workdir: for evaluation and generation. Nothing in the workdir
is changed."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.training import checkpoints, run_record
from experiments.training.config import Config
from experiments.training.mesh import make_mesh, named, parameter_specs
from experiments.training.metrics import read_rows
from experiments.training.notices import warn
from experiments.training.state import Blueprint, initial_model, make_blueprint, with_shardings
from experiments.training.task import Task, configured_task


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    workdir: Path
    config: Config
    task: Task
    blueprint: Blueprint
    mesh: Mesh
    step: int
    params: Any
    variables: Any

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.config.seeds)

    def replica(self, place: int) -> tuple[Any, Any]:
        """(params, variables) of one replica, without a replica axis, on one device: for a few
        sequences, which need not divide over several."""
        both = (self.params, self.variables)
        if len(self.seeds) > 1:
            both = jax.tree.map(lambda leaf: leaf[place], both)
        return jax.device_put(both, jax.local_devices()[0])


def load_run(workdir: Path, step: str = "latest") -> LoadedRun:
    """The run in `workdir` at a checkpoint: "latest" (the newest whole one), "best" or a step.

    Parameters are replicated over all devices. Raises ValueError if there is no such run or
    checkpoint."""
    workdir = workdir.expanduser().absolute()
    config = run_record.read_config(workdir)
    task = configured_task(config)
    blueprint = make_blueprint(config, task)
    mesh = make_mesh({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
    found, params, variables = load_model(workdir, step, config, blueprint, mesh)
    return LoadedRun(workdir, config, task, blueprint, mesh, found, params, variables)


def load_model(
    workdir: Path, step: str, config: Config, blueprint: Blueprint, mesh: Mesh
) -> tuple[int, Any, Any]:
    """(step, params, variables) of a checkpoint in `workdir`, for the model of `blueprint` with
    `config.seeds`.

    Raises ValueError if there is no such checkpoint, if it is damaged, or if it has other shapes.
    """
    directory = workdir / "checkpoints"
    available = checkpoints.steps(directory)
    if not available:
        raise ValueError(
            f"{workdir} holds no checkpoint (of a run that has reached"
            " config.checkpoint.every_steps)"
        )
    seeds = tuple(config.seeds)
    params, variables = jax.eval_shape(functools.partial(initial_model, blueprint, seeds))
    specs = {
        "params": parameter_specs(mesh, blueprint.params, len(seeds) > 1, config.mesh.zero),
        "variables": jax.tree.map(lambda _: jax.P(), variables),
    }
    wanted = {
        "model": with_shardings({"params": params, "variables": variables}, named(mesh, specs))
    }
    if step == "latest":
        restored = checkpoints.restore_latest(directory, wanted)
        if restored is None:
            raise ValueError(f"{workdir} has no checkpoint")
        found, parts, damaged = restored
        for problem in damaged:
            warn(f"damaged checkpoint {problem}: using the one of step {found}")
    else:
        found = (
            best_step(workdir, config, available) if step == "best" else _number(step, available)
        )
        try:
            parts = checkpoints.restore(directory, found, wanted)
        except checkpoints.DamagedCheckpointError as error:
            raise ValueError(
                f"damaged checkpoint: {error}; choose another --step of {available}"
            ) from error
    return found, parts["model"]["params"], parts["model"]["variables"]


def best_step(workdir: Path, config: Config, available: list[int]) -> int:
    """The step among `available` with the best config.eval.best_metric (mean over seeds) in
    metrics.jsonl."""
    metric = config.eval.best_metric
    best = checkpoints.Best(metric, config.eval.best_mode)
    scores = {
        row["step"]: best.score(
            {metric: float(np.mean([np.nan if v is None else v for v in row[metric]]))}
        )
        for row in read_rows(workdir)
        if metric in row and row["step"] in available
    }
    if not metric or not scores:
        raise ValueError(
            "--step=best needs a checkpoint with config.eval.best_metric (here"
            f" {metric!r}); choose latest or one of {available}"
        )
    return max(scores, key=lambda step: scores[step])


def _number(step: str, available: list[int]) -> int:
    if not step.isdigit() or int(step) not in available:
        raise ValueError(
            f"--step must be latest, best or a checkpoint of {available}; got {step!r}"
        )
    return int(step)
