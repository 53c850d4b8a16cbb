"""What training carries from step to step, and how it starts.

Everything is a plain pytree of arrays. With R > 1 seeds every array has a leading axis [R] and
one program trains the replicas; with one seed there is no such axis."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import P
from jax.sharding import Mesh

import models.networks
from experiments.objectives.classification import Classification
from experiments.objectives.objective import Objective, minimised
from experiments.training.config import Config
from experiments.training.mesh import (
    HOST_MEMORY,
    named,
    optimizer_specs,
    parameter_name,
    parameter_specs,
)
from experiments.training.task import Task
from models.blocks.stack import state_bytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "variables", "opt_state", "window", "average"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """params      trained, or frozen
    variables   all else the model holds, such as the keys of its dropout
    opt_state   of the optimizer
    window      sums of what happened since the last log line, in the state so that an interrupted
                window survives
    average     exponential moving average of params in float32, or None without config.ema_decay
    """

    params: Any
    variables: Any
    opt_state: Any
    window: Any
    average: Any = None


@dataclass(frozen=True)
class Blueprint:
    """A model without numbers.

    build           seed -> the model
    graphdef        what `nnx.merge` needs
    params          abstract parameters with their metadata
    state_bytes     bytes of recurrent state per sequence; None for a model that keeps none
    """

    build: Callable[[jax.Array], nnx.Module]
    graphdef: Any
    params: nnx.State
    state_bytes: int | None

    @property
    def parameter_count(self) -> int:
        return sum(param.size for param in jax.tree.leaves(self.params))


def available_networks() -> tuple[str, ...]:
    """Names of the files in models/networks."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(models.networks.__path__)))


def find_network(name: str) -> Any:
    return importlib.import_module(f"models.networks.{name}")


def make_blueprint(config: Config, task: Task) -> Blueprint:
    """The model of the config for this task, traced but not computed.

    Raises ValueError for a name or an option that does not exist, with those that do, and for a
    network that needs a size which the task does not have.
    """
    options = config.model.to_dict()
    name = options.pop("name")
    if name not in available_networks():
        raise ValueError(
            f"config.model.name must be one of {', '.join(available_networks())}; got {name!r}"
        )
    module = find_network(name)
    sizes = _wanted_sizes(name, module.build, task)

    def build(seed: jax.Array) -> nnx.Module:
        # Streams of their own: dropout does not change how the parameters start.
        default, params, dropout = jax.random.split(jax.random.key(seed), 3)
        return module.build(
            options,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            rngs=nnx.Rngs(default, params=params, dropout=dropout),
            **sizes,
        )

    abstract = nnx.eval_shape(build, jax.ShapeDtypeStruct((), jnp.uint32))
    graphdef, params, _ = nnx.split(abstract, nnx.Param, ...)
    return Blueprint(build, graphdef, params, state_bytes(abstract))


def _wanted_sizes(name: str, build: Any, task: Task) -> dict[str, int]:
    """The sizes of the task that a network's `build` names."""
    given = ("rngs", "param_dtype", "compute_dtype")
    wanted = [
        parameter
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name not in given
    ]
    for parameter in wanted:
        if parameter.default is inspect.Parameter.empty and parameter.name not in task.sizes:
            has = ", ".join(task.sizes) or "none"
            raise ValueError(
                f"config.model.name={name} needs a task with the size {parameter.name!r}; the"
                f" sizes of config.task are: {has}"
            )
    if isinstance(task.objective, Classification) and all(p.name != "classes" for p in wanted):
        raise ValueError(
            f"config.model.name={name} has no head of classes, which config.task.name asks for; use"
            " sequence_classifier or image_classifier, or a task whose answer is a token"
        )
    if "output_channels" in task.sizes and all(p.name != "output_channels" for p in wanted):
        raise ValueError(
            f"config.model.name={name} makes no images, which config.task.name asks for; use"
            " diffusion_transformer"
        )
    return {p.name: task.sizes[p.name] for p in wanted if p.name in task.sizes}


def over_replicas(
    function: Callable[..., Any],
    replicas: int,
    in_axes: Sequence[int | None] = (0,),
    *,
    in_turn: bool = False,
) -> Callable[..., Any]:
    """`function` over a leading replica axis if there are several replicas; `function` itself if
    there is one. in_axes: 0 or None for each argument, as `jax.vmap` takes them.

    Either all at once, or with `in_turn` one after the other: for devices that one replica keeps
    busy (`replicas_in_turn`)."""
    if replicas == 1:
        return function
    if not in_turn:
        return jax.vmap(function, in_axes=tuple(in_axes))

    def over(*arguments: Any) -> Any:
        def one(places: tuple[Any, ...]) -> Any:
            own = iter(places)
            both = zip(arguments, in_axes, strict=True)
            return function(*(whole if axis is None else next(own) for whole, axis in both))

        split = zip(arguments, in_axes, strict=True)
        return jax.lax.map(one, tuple(whole for whole, axis in split if axis is not None))

    return over


def replicas_in_turn(mesh: Mesh) -> bool:
    """Whether replicas on this mesh take turns: on CPUs, where batched products and loops of small
    models cost more than the same ones after each other."""
    return mesh.devices.flat[0].platform == "cpu"


def seed_array(seeds: Sequence[int]) -> np.ndarray:
    """uint32 [R], or [] of one seed."""
    return np.asarray(seeds if len(seeds) > 1 else seeds[0], np.uint32)


def initial_model(blueprint: Blueprint, seeds: Any) -> tuple[Any, Any]:
    """(params, variables) before the first step, of `seed_array`; to be called inside jit, so that
    arrays are born sharded."""

    def one(seed: jax.Array) -> tuple[Any, Any]:
        _, params, variables = nnx.split(blueprint.build(seed), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)

    return over_replicas(one, seeds.size)(seeds)


def initial_state(
    blueprint: Blueprint,
    tx: optax.GradientTransformation,
    sums: Sequence[str],
    seeds: Any,
    averaged: bool = False,
) -> TrainState:
    """The state before the first step, with an empty window for the named sums; `seeds` and inside
    jit, like `initial_model`."""
    params, variables = initial_model(blueprint, seeds)
    return TrainState(
        params,
        variables,
        over_replicas(tx.init, seeds.size)(params),
        empty_window(sums, seeds.size),
        average_of(params) if averaged else None,
    )


def average_of(params: Any) -> Any:
    """The average before the first step: the parameters themselves, in float32."""
    # A copy, so that no array of the state is there twice and both can be given away.
    return jax.tree.map(lambda param: jnp.array(param, jnp.float32, copy=True), params)


def by_path(params: Any) -> dict[str, Any]:
    """{"stack/period/0/mixer/kernel": array} of a tree of parameters."""
    return {parameter_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def vocabulary_tables(params: nnx.State) -> set[str]:
    """Paths of the abstract parameters, as in `by_path`, that have an entry per token."""
    return {
        "/".join(map(str, path))
        for path, param in nnx.to_flat_state(params)
        if "vocabulary" in (param.get_metadata().get("out_sharding") or ())
    }


def empty_window(sums: Sequence[str], replicas: int) -> dict[str, Any]:
    """Zeros for what a step collects."""
    shape = (replicas,) if replicas > 1 else ()
    counts = ("accepted_steps", "rejected_steps", "longest_rejected_run", "rejected_in_all")
    return {
        "sums": {name: jnp.zeros(shape, jnp.float32) for name in sums},
        "gradient_norm": jnp.zeros(shape, jnp.float32),
        **{name: jnp.zeros(shape, jnp.int32) for name in counts},
    }


def sum_names(blueprint: Blueprint, objective: Objective, batch: Any) -> tuple[str, ...]:
    """Names of the sums that the objective returns for a batch of one replica; also shows that
    model and task fit.

    Traces the forward pass: raises what the model raises for impossible sizes, before anything is
    compiled."""

    def sums(seed: jax.Array, batch: Any) -> Any:
        return minimised(objective, blueprint.build(seed), batch, jax.random.key(seed))[1]

    names = tuple(jax.eval_shape(sums, jax.ShapeDtypeStruct((), jnp.uint32), batch))
    for name in ("loss_sum", "weight_sum"):
        if name not in names:
            raise ValueError(
                f"an objective's sums must have {name}; {objective} has {', '.join(names)}"
            )
    return names


def model_specs(
    mesh: Mesh, blueprint: Blueprint, variables: Any, replicas: int = 1, zero: int = 3
) -> tuple[Any, Any]:
    """PartitionSpecs of the parameters and of the variables; `zero` as config.mesh.zero."""
    params = parameter_specs(mesh, blueprint.params, replicas > 1, zero)
    return params, jax.tree.map(lambda _: P(), variables)


def state_specs(
    mesh: Mesh,
    blueprint: Blueprint,
    tx: optax.GradientTransformation,
    state: TrainState,
    replicas: int = 1,
    zero: int = 3,
) -> TrainState:
    """PartitionSpecs of an abstract state; `zero` as config.mesh.zero."""
    params, variables = model_specs(mesh, blueprint, state.variables, replicas, zero)
    moments = parameter_specs(mesh, blueprint.params, replicas > 1)
    return TrainState(
        params,
        variables,
        optimizer_specs(tx, state.opt_state, moments),
        jax.tree.map(lambda _: P(), state.window),
        # Like the moments: no step but the last line of each reads it.
        None if state.average is None else moments,
    )


def state_shardings(mesh: Mesh, specs: TrainState, offload: bool) -> TrainState:
    """Where a state lies between steps: in the devices' memory, with `offload` the optimizer's in
    that of the host."""
    shardings = named(mesh, specs)
    return (
        replace(shardings, opt_state=named(mesh, specs.opt_state, HOST_MEMORY))
        if offload
        else shardings
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays that say where they lie: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
