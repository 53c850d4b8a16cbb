"""A run's train step with nothing in it: mesh, state and batch as shapes that say where they lie.

Built as experiments/train.py builds them, over any devices, such as those of a TPU slice that is
not there. Nothing of the model's or the batch's size is allocated."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import NamedSharding, P
from jax.sharding import Mesh

from experiments.training.config import Config
from experiments.training.mesh import BATCH_AXES, HOST_MEMORY
from experiments.training.optimizer import make_optimizer, make_schedule, parameter_groups
from experiments.training.speed import count_weights
from experiments.training.state import (
    Blueprint,
    TrainState,
    initial_state,
    make_blueprint,
    make_step,
    state_shardings,
    state_specs,
    sum_names,
    with_shardings,
)
from experiments.training.task import Examples, Task, batch_length, configured_task


@dataclass(frozen=True)
class AbstractRun:
    """What is compiled, `step(state, batch)`, and facts about it; model_flops is None where batches
    have no tokens."""

    blueprint: Blueprint
    step: Any
    state: TrainState
    batch: dict[str, Any]
    sequence_length: int
    model_flops: float | None


def abstract_run(config: Config, mesh: Mesh) -> AbstractRun:
    """The run of a config on a mesh. Raises ValueError for what cannot work."""
    task = configured_task(config)
    seeds, offload = tuple(config.seeds), config.optimizer.offload
    blueprint = make_blueprint(config, task)
    schedule = make_schedule(config.optimizer, config.steps)
    tx = make_optimizer(config.optimizer, schedule, parameter_groups(blueprint.params))
    example = _abstract_batch(task, config.batch_size, seeds[0])
    sums = sum_names(blueprint, task, example)
    state = jax.eval_shape(lambda: initial_state(blueprint, tx, sums, seeds))
    specs = state_specs(mesh, blueprint, tx, state, seeds, config.mesh.zero)
    shardings = state_shardings(mesh, specs, offload)
    step = jax.jit(
        make_step(blueprint, task, tx, seeds, accumulate=config.accumulate, offload=offload),
        donate_argnums=0,
        out_shardings=shardings,
    )
    model_flops = None
    if "tokens" in example:
        body, table = count_weights(blueprint.params)
        tokens, targets = example["tokens"].size, example["targets"].size
        model_flops = 6.0 * len(seeds) * (body * tokens + table * targets)
    return AbstractRun(
        blueprint,
        step,
        with_shardings(state, shardings),
        _laid_out(mesh, example, replicas=len(seeds)),
        batch_length(example),
        model_flops,
    )


def filling_batch_size(config: Config, mesh: Mesh) -> int:
    """The config's batch size, raised to what its parts can fill data x fsdp with."""
    shards = config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-config.batch_size // shards) * shards


def _abstract_batch(task: Task, batch_size: int, seed: int) -> dict[str, Any]:
    """Shapes [B, ...] of a training batch, the longest if lengths differ; one example is made, not
    B."""
    parts = task.train(seed)
    parts = (parts,) if isinstance(parts, Examples) else parts
    ones = [part.fetch(np.arange(1)) for part in parts]
    one = max(ones, key=batch_length)
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
        )
        for name, array in one.items()
    }


def _laid_out(mesh: Mesh, batch: dict[str, Any], replicas: int) -> dict[str, Any]:
    """With the shardings of `experiments.training.mesh.place_batch`, and its replica axis."""
    length = batch_length(batch)
    lead = (replicas,) if replicas > 1 else ()

    def laid_out(array: Any) -> Any:
        has_time = mesh.shape["sequence"] > 1 and array.shape[1:2] == (length,)
        spec = P(*[None] * len(lead), BATCH_AXES, *["sequence"] * has_time)
        return jax.ShapeDtypeStruct(
            (*lead, *array.shape), array.dtype, sharding=NamedSharding(mesh, spec)
        )

    return {name: laid_out(array) for name, array in batch.items()}


def shard_bytes(tree: Any, on_host: bool = False) -> int:
    """Bytes that one device has of abstract arrays: in its own memory, or of those that lie in its
    host's."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (leaf.sharding.memory_kind == HOST_MEMORY) == on_host
    )
