"""What training carries from step to step, and the one compiled step that advances it.

Everything is a plain pytree of arrays. With R > 1 seeds every array has a leading axis [R] and one
vmap trains the replicas together; with one seed there is no such axis."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import Mesh

import models.networks
from experiments.objectives.objective import objective
from experiments.training.accumulation import in_parts
from experiments.training.config import Config
from experiments.training.mesh import HOST_MEMORY, named, optimizer_specs, parameter_specs
from experiments.training.task import Task
from models.networks.stack import state_bytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "variables", "opt_state", "window"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """params: trained; variables: all else the model holds, such as the keys of its dropout;
    window: sums of what happened since the last log line, in the state so that an interrupted
    window survives."""

    params: Any
    variables: Any
    opt_state: Any
    window: Any


@dataclass(frozen=True)
class Blueprint:
    """A model without numbers: what `nnx.merge` needs, abstract parameters with their metadata,
    bytes of state."""

    build: Callable[[jax.Array], nnx.Module]
    graphdef: Any
    params: nnx.State
    state_bytes: int | None

    @property
    def parameter_count(self) -> int:
        return sum(param.size for param in jax.tree.leaves(self.params))


def available_models() -> tuple[str, ...]:
    """Names of the files in models/networks that define `build`."""
    names = (module.name for module in pkgutil.iter_modules(models.networks.__path__))
    return tuple(sorted(name for name in names if hasattr(find_network(name), "build")))


def find_network(name: str) -> Any:
    return importlib.import_module(f"models.networks.{name}")


def make_blueprint(config: Config, task: Task) -> Blueprint:
    """The model of the config for this task, traced but not computed.

    Raises ValueError for a name or an option that does not exist, with those that do.
    """
    options = config.model.to_dict()
    name = options.pop("name")
    if name not in available_models():
        raise ValueError(
            f"config.model.name must be one of {', '.join(available_models())}; got {name!r}"
        )
    module = find_network(name)
    sizes = {"vocabulary": task.vocabulary_size}
    named = inspect.signature(module.build).parameters
    sizes = {size: value for size, value in sizes.items() if size in named}

    def build(seed: jax.Array) -> nnx.Module:
        # Streams of their own: dropout does not change how the parameters start.
        default, params, dropout = jax.random.split(jax.random.key(seed), 3)
        return module.build(
            options,
            **sizes,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            rngs=nnx.Rngs(default, params=params, dropout=dropout),
        )

    abstract = nnx.eval_shape(build, jax.ShapeDtypeStruct((), jnp.uint32))
    graphdef, params, _ = nnx.split(abstract, nnx.Param, ...)
    return Blueprint(build, graphdef, params, state_bytes(abstract))


def over_replicas(
    function: Callable[..., Any], seeds: Sequence[int], in_axes: Any = 0
) -> Callable[..., Any]:
    """`function` over a leading replica axis if there are several seeds; `function` itself if there
    is one."""
    return jax.vmap(function, in_axes=in_axes) if len(seeds) > 1 else function


def initial_model(blueprint: Blueprint, seeds: Sequence[int]) -> tuple[Any, Any]:
    """(params, variables) before the first step; to be called inside jit, so that arrays are born
    sharded."""

    def one(seed: jax.Array) -> tuple[Any, Any]:
        _, params, variables = nnx.split(blueprint.build(seed), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)

    seed = jnp.asarray(seeds, jnp.uint32)
    return over_replicas(one, seeds)(seed if len(seeds) > 1 else seed[0])


def initial_state(
    blueprint: Blueprint,
    tx: optax.GradientTransformation,
    sums: Sequence[str],
    seeds: Sequence[int],
) -> TrainState:
    """The state before the first step, with an empty window for the named sums; inside jit, like
    `initial_model`."""
    params, variables = initial_model(blueprint, seeds)
    return TrainState(
        params, variables, over_replicas(tx.init, seeds)(params), empty_window(sums, seeds)
    )


def empty_window(sums: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Zeros for what `make_step` collects."""
    shape = (len(seeds),) if len(seeds) > 1 else ()
    counts = ("accepted_steps", "rejected_steps", "longest_rejected_run", "rejected_in_all")
    return {
        "sums": {name: jnp.zeros(shape, jnp.float32) for name in sums},
        "gradient_norm": jnp.zeros(shape, jnp.float32),
        **{name: jnp.zeros(shape, jnp.int32) for name in counts},
    }


def sum_names(blueprint: Blueprint, task: Task, batch: Any) -> tuple[str, ...]:
    """Names of the sums that the objective returns for a batch of one replica; also shows that
    model and task fit.

    Traces the forward pass: raises what the model raises for impossible sizes, before anything is
    compiled."""

    def sums(seed: jax.Array, batch: Any) -> Any:
        return objective(task.loss, blueprint.build(seed), batch)[1]

    return tuple(jax.eval_shape(sums, jax.ShapeDtypeStruct((), jnp.uint32), batch))


def state_specs(
    mesh: Mesh,
    blueprint: Blueprint,
    tx: optax.GradientTransformation,
    state: TrainState,
    seeds: Sequence[int],
    zero: int = 3,
) -> TrainState:
    """PartitionSpecs of an abstract state; `zero` as config.mesh.zero."""
    several = len(seeds) > 1
    moments = parameter_specs(mesh, blueprint.params, several)
    replicated = functools.partial(jax.tree.map, lambda _: P())
    return TrainState(
        parameter_specs(mesh, blueprint.params, several, zero),
        replicated(state.variables),
        optimizer_specs(tx, state.opt_state, moments),
        replicated(state.window),
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


def make_step(
    blueprint: Blueprint,
    task: Task,
    tx: optax.GradientTransformation,
    seeds: Sequence[int],
    *,
    accumulate: int = 1,
    offload: bool = False,
) -> Callable[[TrainState, Any], TrainState]:
    """(state, batch) -> state, pure. A step whose loss or gradient is not finite changes neither
    parameters, nor optimizer moments, nor variables; it is counted and nothing else.

    The batch is worked on in `accumulate` parts, one after the other. With `offload` the optimizer
    state that comes in lies in the memory of the host; that the new one goes there is up to the
    shardings of the output."""

    def loss_of(params: Any, variables: Any, batch: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(blueprint.graphdef, params, variables)
        loss, sums = objective(task.loss, model, batch)
        return loss, (sums, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))))

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate > 1:
        gradient = in_parts(gradient, accumulate)

    def one(state: TrainState, batch: Any) -> TrainState:
        (loss, (sums, variables)), grads = gradient(state.params, state.variables, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # The guard in the optimizer looks at gradients alone: a non-finite loss must reach it
        # through them.
        grads = jax.tree.map(lambda grad: jnp.where(finite, grad, jnp.nan), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        guard = cast(optax.ApplyIfFiniteState, opt_state)
        params = optax.apply_updates(state.params, updates)
        variables = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), variables, state.variables
        )

        window = state.window
        window = {
            "sums": jax.tree.map(
                lambda total, new: total + jnp.where(finite, new, 0.0), window["sums"], sums
            ),
            "gradient_norm": window["gradient_norm"] + jnp.where(finite, norm, 0.0),
            "accepted_steps": window["accepted_steps"] + finite,
            "rejected_steps": window["rejected_steps"] + ~finite,
            "longest_rejected_run": jnp.maximum(
                window["longest_rejected_run"], guard.notfinite_count
            ),
            "rejected_in_all": guard.total_notfinite,
        }
        return TrainState(params, variables, opt_state, window)

    def step(state: TrainState, batch: Any) -> TrainState:
        if offload:
            opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
            state = replace(state, opt_state=opt_state)
        return over_replicas(one, seeds)(state, batch)

    return step
