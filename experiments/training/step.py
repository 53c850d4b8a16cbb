"""The one step that advances a training state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.objectives.objective import Objective, minimised
from experiments.training.hyperparameters import Hyperparameters
from experiments.training.optimizer import FROZEN
from experiments.training.state import Blueprint, TrainState, over_replicas
from models.parts.variables import set_steps_before

# The stream of a seed's random numbers that objectives draw from; the model has others.
OBJECTIVE_STREAM = 0x0B1EC7


def make_step(
    blueprint: Blueprint,
    objective: Objective,
    optimizer: Callable[[Hyperparameters], optax.GradientTransformation],
    groups: Any,
    *,
    accumulate: int = 1,
    offload: bool = False,
    replicas: int = 1,
    in_turn: bool = False,
) -> Callable[[TrainState, Any, Any, Hyperparameters], TrainState]:
    """(state, batch, number, hyperparameters) -> state, pure; `number` int32 [] counts the steps
    from 1.

    A step whose loss or gradient is not finite changes neither parameters and their average, nor
    optimizer moments, nor variables; it is counted and nothing else. The objective's key follows
    from seed and number, so that a run that goes on from a checkpoint draws what it would have
    drawn.

    groups: of the parameters (`parameter_groups`); those of "frozen" have no gradient. The batch is
    worked on in `accumulate` parts, one after the other. With `offload` the optimizer state that
    comes in lies in the memory of the host; that the new one goes there is up to the shardings of
    the output. Where the state has one, average <- d average + (1 - d) params, d being
    config.ema_decay. With `in_turn` replicas are trained one after the other
    (`over_replicas`)."""

    def loss_of(params: Any, variables: Any, batch: Any, key: Any) -> tuple[jax.Array, Any]:
        params = jax.tree.map(
            lambda param, group: jax.lax.stop_gradient(param) if group == FROZEN else param,
            params,
            groups,
        )
        model = nnx.merge(blueprint.graphdef, params, variables)
        loss, sums = minimised(objective, model, batch, key)
        return loss, (sums, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))))

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate > 1:
        gradient = in_parts(gradient, accumulate)

    def one(
        state: TrainState, batch: Any, seed: jax.Array, number: jax.Array, numbers: Hyperparameters
    ) -> TrainState:
        tx = optimizer(numbers)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), OBJECTIVE_STREAM), number)
        model = nnx.merge(blueprint.graphdef, state.params, state.variables)
        set_steps_before(model, number - 1)
        variables = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        (loss, (sums, variables)), grads = gradient(state.params, variables, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # The guard in the optimizer looks at gradients alone: a non-finite loss must reach it
        # through them. Updates are float32, whatever the parameters are.
        grads = jax.tree.map(
            lambda grad: jnp.where(finite, grad.astype(jnp.float32), jnp.nan), grads
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        guard = cast(optax.ApplyIfFiniteState, opt_state)
        params = optax.apply_updates(state.params, updates)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        average = state.average
        if average is not None:
            moved = optax.incremental_update(params, average, numbers.average_step)
            average = if_finite(moved, average)
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
        variables = if_finite(variables, state.variables)
        return TrainState(params, variables, opt_state, window, average)

    def step(state: TrainState, batch: Any, number: Any, numbers: Hyperparameters) -> TrainState:
        if offload:
            opt_state = jax.device_put(state.opt_state, jax.memory.Space.Device)
            state = replace(state, opt_state=opt_state)
        over = over_replicas(one, replicas, in_axes=(0, 0, 0, None, None), in_turn=in_turn)
        return over(state, batch, numbers.seeds, number, numbers)

    return step


def in_parts(gradient: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """(params, variables, batch, key) -> ((loss, (sums, variables)), grads) like `gradient`: the
    gradient of the whole batch in the memory of a part.

    Means over the whole batch are means of the parts' by their weight_sum, so the objective's loss
    and its gradient are what they are in one piece. An auxiliary loss is taken of each part alone,
    which is not the same, and averaged so, too. Gradients, sums over parts, are float32. Part a has
    the rows a, a + parts, ...: each device finds its share of every part among its own rows. Each
    part has a key of its own."""

    def whole(params: Any, variables: Any, batch: Any, key: Any) -> Any:
        split = jax.tree.map(
            lambda array: jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1), batch
        )

        def weighted(variables: Any, part: Any, number: Any) -> tuple[Any, Any]:
            part_key = jax.random.fold_in(key, number)
            (loss, (sums, variables)), grads = gradient(params, variables, part, part_key)
            both = jax.tree.map(
                lambda leaf: sums["weight_sum"] * leaf.astype(jnp.float32), (loss, grads)
            )
            return variables, (sums, both)

        def add(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
            total, variables = carry
            variables, new = weighted(variables, *part)
            return (jax.tree.map(jnp.add, total, new), variables), None

        first = jax.tree.map(lambda array: array[0], split)
        shapes = jax.eval_shape(weighted, variables, first, 0)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((sums, both), variables), _ = jax.lax.scan(
            add, (zeros, variables), (split, jnp.arange(parts))
        )
        weight = jnp.where(sums["weight_sum"] == 0, 1.0, sums["weight_sum"])
        loss, grads = jax.tree.map(lambda leaf: leaf / weight, both)
        return (loss, (sums, variables)), grads

    return whole
