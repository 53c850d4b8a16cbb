"""A batch in parts, one after the other: the gradient of the whole in the memory of a part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_parts(gradient: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """(params, variables, batch) -> ((loss, (sums, variables)), grads) like `gradient`, from that
    of each part.

    Means over the whole batch are means of the parts' by the weight of their targets, so the task's
    loss and its gradient are what they are in one piece. An auxiliary loss is taken of each part
    alone, which is not the same, and averaged so, too. Sums over parts are float32. Part a has the
    rows a, a + parts, ...: each device finds its share of every part among its own rows."""

    def whole(params: Any, variables: Any, batch: Any) -> Any:
        split = jax.tree.map(
            lambda array: jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1), batch
        )

        def weighted(variables: Any, part: Any) -> tuple[Any, Any]:
            (loss, (sums, variables)), grads = gradient(params, variables, part)
            both = jax.tree.map(
                lambda leaf: sums["weight_sum"] * leaf.astype(jnp.float32), (loss, grads)
            )
            return variables, (sums, both)

        def add(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
            total, variables = carry
            variables, new = weighted(variables, part)
            return (jax.tree.map(jnp.add, total, new), variables), None

        first = jax.tree.map(lambda array: array[0], split)
        shapes = jax.eval_shape(weighted, variables, first)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((sums, both), variables), _ = jax.lax.scan(add, (zeros, variables), split)
        weight = jnp.where(sums["weight_sum"] == 0, 1.0, sums["weight_sum"])
        loss, grads = jax.tree.map(lambda leaf: leaf / weight, both)
        grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
        return (loss, (sums, variables)), grads

    return whole
