"""A trained run, read back from its workdir: for evaluation and generation. Nothing in the workdir
is changed."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding
from jax.sharding import Mesh

from experiments.training import checkpoints, run_data, run_record
from experiments.training.config import Config
from experiments.training.mesh import make_mesh, named, parameter_name
from experiments.training.metrics_file import read_rows
from experiments.training.program import Program
from experiments.training.progress import warn
from experiments.training.state import (
    Blueprint,
    average_of,
    by_path,
    initial_model,
    make_blueprint,
    model_specs,
    seed_array,
    vocabulary_tables,
    with_shardings,
)
from experiments.training.task import Task, configured_task

TEACHER = "teacher/"  # where a network, or a mixer, has the one that it learns from


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


def load_run(
    workdir: Path,
    step: str = "latest",
    *,
    averaged: bool = False,
    reads_data: bool = True,
    changed_data: bool = False,
) -> LoadedRun:
    """The run in `workdir` at a checkpoint: "latest" (the newest whole one), "best" or a step; with
    averaged=True the average of its parameters.

    With reads_data=False the task has no examples, and its data need not be there. Parameters are
    replicated over all devices. Raises ValueError if there is no such run or checkpoint, no average
    in it, or if the data are not those of training, unless changed_data=True."""
    workdir = workdir.expanduser().absolute()
    config = run_record.read_config(workdir)
    if averaged and not config.ema_decay:
        raise ValueError(
            f"--averaged needs a run with an average (config.ema_decay); {workdir} has none"
        )
    task_config = run_data.with_kept_files(config, workdir)
    task = None if reads_data else run_data.task_without_data(workdir)
    if task is None:
        task = configured_task(task_config)
        remedy = None if changed_data else "evaluate on what they are now, with --changed_data"
        if reads_data:
            run_data.check_same_data(workdir, config, task.provenance, remedy)
        run_data.check_same_tokenizer(workdir, task)
    blueprint = make_blueprint(config, task)
    mesh = make_mesh({"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1})
    seeds = tuple(config.seeds)
    initial = functools.partial(initial_model, blueprint)
    params, variables = jax.eval_shape(initial, seed_array(seeds))
    specs = model_specs(mesh, blueprint, variables, len(seeds), config.mesh.zero)
    places = named(mesh, specs)
    wanted = {
        "model": {
            "params": with_shardings(params, places[0]),
            "variables": with_shardings(variables, places[1]),
        }
    }
    if averaged:
        average = jax.eval_shape(average_of, params)
        wanted["average"] = {"params": with_shardings(average, places[0])}
    found, parts = load_parts(workdir, step, config, wanted)
    loaded = parts["average" if averaged else "model"]["params"]
    variables = parts["model"]["variables"]
    return LoadedRun(workdir, config, task, blueprint, mesh, found, loaded, variables)


def load_parts(
    workdir: Path, step: str, config: Config, wanted: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """(step, parts) of a checkpoint in `workdir`; `wanted` as in `checkpoints.restore`.

    Raises ValueError if there is no such checkpoint, if it is damaged, or if it has other
    shapes."""
    directory = workdir / "checkpoints"
    available = _available(workdir)
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
    return found, parts


def matching_params(source: Path, program: Program) -> dict[str, jax.Array]:
    """The parameters of the newest whole checkpoint in `source` that a run has too, with the same
    path and shape, by path; as the run's programs want them. Those that match an expression of
    config.init_except are not taken. A teacher, of a network or of a mixer, is the one that the
    source has, or else the source: a network that has a teacher learns from that run.

    Warns of what is left out on either side, and of other data. Raises ValueError if there is no
    checkpoint, if nothing fits, or if tokens there are other ones."""
    source = source.expanduser().absolute()
    directory = source / "checkpoints"
    wanted = by_path(program.state.params)
    try:
        _available(source)
        stored = checkpoints.stored_shapes(directory, "model")
        there = by_path(stored["params"])
        takes = _taken(there, wanted, program.config.init_except)
        if not takes:
            raise ValueError(_nothing_fits(source, there, wanted))
        first_user = {own: path for path, own in reversed(takes.items())}
        tables = vocabulary_tables(program.blueprint.params)
        tokens = bool(takes.keys() & tables)
        run_data.check_source(source, program.config, program.task, tokens=tokens)

        def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = parameter_name(path[1:])
            fitting = path[0].key == "params" and name in first_user
            everywhere = NamedSharding(program.mesh, jax.P())
            sharding = wanted[first_user[name]].sharding if fitting else everywhere
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        restored = checkpoints.restore_latest(
            directory, {"model": jax.tree.map_with_path(placed, stored)}
        )
    except (ValueError, checkpoints.DamagedCheckpointError) as error:
        raise ValueError(f"config.init_from: {error}") from error
    assert restored is not None
    _, parts, damaged = restored
    for problem in damaged:
        warn(f"config.init_from: damaged checkpoint {problem}: using an older one")
    for what, names in (
        ("not taken from the checkpoint", there.keys() - first_user.keys()),
        ("not in the checkpoint, starting from the seed", wanted.keys() - takes.keys()),
    ):
        if names:
            warn(f"config.init_from: {what}: {', '.join(sorted(names))}")
    loaded = by_path(parts["model"]["params"])
    # A teacher's are a copy: the first step gives its arrays away, and none may be there twice.
    return {
        path: jnp.array(loaded[own], wanted[path].dtype, copy=path != own)
        for path, own in takes.items()
    }


def _taken(there: Any, wanted: Any, left_out: Sequence[str]) -> dict[str, str]:
    """Paths of wanted parameters and, for each, where it is found there. Raises ValueError for an
    expression that leaves nothing out."""
    fits: dict[str, str] = {}
    for path, leaf in wanted.items():
        fitting = [o for o in _origins(path) if o in there and there[o].shape == leaf.shape]
        if fitting:
            fits[path] = fitting[0]
    for pattern in left_out:
        if not any(re.fullmatch(pattern, path) for path in fits):
            raise ValueError(
                "config.init_except must be regular expressions that match whole paths of"
                f" parameters; {pattern!r} matches none of {', '.join(sorted(fits))}"
            )
    return {
        path: own
        for path, own in fits.items()
        if not any(re.fullmatch(pattern, path) for pattern in left_out)
    }


def _origins(path: str) -> list[str]:
    """Where a parameter may lie in a source, the best first: that of a teacher may be in a teacher
    there, in the teacher that one mixer has, or in the source itself."""
    bare = re.sub(rf"(^|/){TEACHER}", r"\1", path)
    if path == bare:
        return [path]
    inner = [bare.replace("/mixer/", f"/mixer/{TEACHER}")] if path.startswith(TEACHER) else []
    return [path, *inner, bare]


def _nothing_fits(source: Path, there: Any, wanted: Any) -> str:
    shared = sorted(there.keys() & wanted.keys())
    detail = (
        f"{shared[0]} has shape {there[shared[0]].shape} there and {wanted[shared[0]].shape} here"
        if shared
        else f"it has {', '.join(sorted(there))}, and this run {', '.join(sorted(wanted))}"
    )
    return f"no parameter of the checkpoint in {source} fits this run: {detail}"


def _available(workdir: Path) -> list[int]:
    available = checkpoints.steps(workdir / "checkpoints")
    if not available:
        raise ValueError(
            f"{workdir} holds no checkpoint (of a run that has reached"
            " config.checkpoint.every_steps)"
        )
    return available


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
