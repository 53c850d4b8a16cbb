"""Everything that a run compiles, assembled once: by training, by planning for devices that are not
there, and by benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import NamedSharding
from jax.sharding import Mesh

from experiments.objectives.next_token import NextToken, asks_for_next_tokens
from experiments.objectives.objective import Work
from experiments.training.config import Config
from experiments.training.hyperparameters import Hyperparameters, hyperparameters
from experiments.training.mesh import (
    HOST_MEMORY,
    batch_specs,
    check_batch_size,
    parameter_name,
    place_batch,
    replicated,
    traced_on,
)
from experiments.training.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.training.state import (
    Blueprint,
    TrainState,
    average_of,
    empty_window,
    initial_state,
    make_blueprint,
    replicas_in_turn,
    state_shardings,
    state_specs,
    sum_names,
    with_shardings,
)
from experiments.training.step import make_step
from experiments.training.task import Examples, Task, configured_task


@dataclass(frozen=True)
class Program:
    """The programs of a run on a mesh, and what they are made of. Nothing is computed yet.

    task, blueprint             what is learned, by which model
    hyperparameters             by which numbers; NumPy arrays
    sums            names of the sums of the objective
    state           the abstract state, with the shardings it has between steps
    batch           an abstract training batch, the longest if lengths differ, likewise
    work            of that batch, one replica
    initial         seeds -> the state before the first step
    step            (state, batch, number, hyperparameters) -> state; takes the memory of the state
                    that comes in
    empty_window    () -> an empty window
    """

    config: Config
    mesh: Mesh
    task: Task
    blueprint: Blueprint
    hyperparameters: Hyperparameters
    sums: tuple[str, ...]
    state: TrainState
    batch: dict[str, Any]
    work: Work
    initial: Callable[[Any], TrainState]
    step: Any  # jitted, of which a plan asks more than to be called
    empty_window: Callable[[], dict[str, Any]]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.config.seeds)

    def place(self, batch: Mapping[str, np.ndarray]) -> tuple[dict[str, jax.Array], Work]:
        """A batch of the training iterator as global arrays, and its work, that of one replica."""
        several = len(self.seeds) > 1
        length = self.task.objective.work(_one_replica(batch, several)).length
        placed = place_batch(self.mesh, batch, self.config.batch_size, length, several)
        return placed, self.task.objective.work(_one_replica(placed, several))

    def place_hyperparameters(self) -> Hyperparameters:
        """What `step` takes, as global arrays."""
        return replicated(self.mesh, self.hyperparameters)

    def start(self, params: Mapping[str, jax.Array] | None = None) -> TrainState:
        """The state before the first step, with `params` by path in the place of its own."""
        state = self.initial(self.hyperparameters.seeds)
        if not params:
            return state
        own = jax.tree.map_with_path(
            lambda path, leaf: params.get(parameter_name(path), leaf), state.params
        )
        if state.average is None:
            return replace(state, params=own)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state.average)
        average = jax.jit(average_of, out_shardings=shardings)(own)
        return replace(state, params=own, average=average)


def make_program(config: Config, mesh: Mesh) -> Program:
    """The programs of a validated config. Raises ValueError for what cannot work; traces, but
    compiles none of them."""
    check_batch_size(mesh, config.batch_size, config.accumulate)
    task, seeds = configured_task(config), tuple(config.seeds)
    blueprint = make_blueprint(config, task)
    if blueprint.state_bytes is None:
        check_answers_are_not_read(task, seeds[0])
    schedule = make_schedule(config.optimizer, config.steps)
    groups = parameter_groups(blueprint.params, config.optimizer.frozen)
    numbers = hyperparameters(
        config.optimizer, schedule, config.steps, seeds=seeds, ema_decay=config.ema_decay
    )

    def optimizer(numbers: Hyperparameters) -> Any:
        return make_optimizer(config.optimizer, numbers, groups, config.param_dtype)

    tx = optimizer(numbers)
    batch = _abstract_batch(task, config.batch_size, seeds[0])
    work = task.objective.work(batch)
    with traced_on(mesh, config):
        part = _rows(batch, config.batch_size // config.accumulate)
        sums = sum_names(blueprint, task.objective, part)

    def initial(seeds: Any) -> TrainState:
        return initial_state(blueprint, tx, sums, seeds, averaged=config.ema_decay > 0)

    abstract = jax.eval_shape(initial, numbers.seeds)
    specs = state_specs(mesh, blueprint, tx, abstract, len(seeds), config.mesh.zero)
    shardings = state_shardings(mesh, specs, config.optimizer.offload)
    step = make_step(
        blueprint,
        task.objective,
        optimizer,
        groups,
        accumulate=config.accumulate,
        offload=config.optimizer.offload,
        replicas=len(seeds),
        in_turn=replicas_in_turn(mesh),
    )
    return Program(
        config=config,
        mesh=mesh,
        task=task,
        blueprint=blueprint,
        hyperparameters=numbers,
        sums=sums,
        state=with_shardings(abstract, shardings),
        batch=_laid_out(mesh, batch, work.length, replicas=len(seeds)),
        work=work,
        initial=jax.jit(initial, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=shardings),
        empty_window=jax.jit(
            lambda: empty_window(sums, len(seeds)), out_shardings=shardings.window
        ),
    )


def filling_batch_size(config: Config, mesh: Mesh) -> int:
    """The config's batch size, raised to what its parts can fill data x fsdp with."""
    shards = config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-config.batch_size // shards) * shards


def shard_bytes(tree: Any, on_host: bool = False) -> int:
    """Bytes that one device has of abstract arrays: in its own memory, or of those that lie in its
    host's."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == HOST_MEMORY) == on_host
    )


def check_answers_are_not_read(task: Task, seed: int) -> None:
    """Raises ValueError for a task of next tokens, which a model that is not causal has read."""
    if isinstance(task.objective, NextToken) and any(
        asks_for_next_tokens(batch) for batch in _one_of_each(task, seed)
    ):
        raise ValueError(
            "config.task asks for the token that follows, which a model reads unless it is causal;"
            " set causal=True for the mixers of config.model, or use causal ones"
        )


def _one_of_each(task: Task, seed: int) -> list[dict[str, Any]]:
    """A batch of one example of each training part."""
    parts = task.train(seed)
    parts = (parts,) if isinstance(parts, Examples) else parts
    first = np.zeros(1, int)
    return [part.seen(first, first) for part in parts]


def _abstract_batch(task: Task, batch_size: int, seed: int) -> dict[str, Any]:
    """Shapes [B, ...] of a training batch, of the part with the most work if there are several; one
    example is made, not B."""
    one = max(_one_of_each(task, seed), key=lambda batch: task.objective.work(batch).count)
    return _rows(
        {
            name: array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
            for name, array in one.items()
        },
        batch_size,
    )


def _rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(
            (rows, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
        )
        for name, array in batch.items()
    }


def _one_replica(batch: Mapping[str, Any], several: bool) -> dict[str, Any]:
    """Shapes without the replica axis."""
    return {
        name: jax.ShapeDtypeStruct(array.shape[several:], array.dtype)
        for name, array in batch.items()
    }


def _laid_out(
    mesh: Mesh, batch: Mapping[str, Any], length: int | None, replicas: int
) -> dict[str, Any]:
    lead = (replicas,) if replicas > 1 else ()
    shapes = {name: (*lead, *array.shape) for name, array in batch.items()}
    specs = batch_specs(mesh, shapes, length, replicated_axis=replicas > 1)
    return {
        name: jax.ShapeDtypeStruct(
            shapes[name], array.dtype, sharding=NamedSharding(mesh, specs[name])
        )
        for name, array in batch.items()
    }
