"""Variables of a layer that are no parameters: what it reports to its trainer, what its paper fixes
per layer, and how far training is.

A layer calls `report`; the trainer wraps the model's call in `nnx.capture(..., Report)` and gets
what was reported, stacked over scanned layers. Without such a trainer (decoding, a model called by
hand) nothing is kept."""

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# The report that is added to the loss, by name; all others are only logged.
AUXILIARY_LOSS = "auxiliary_loss"
# Reports of layers that learn by themselves: they are logged layer by layer, too.
TRANSFER_ERROR = "transfer_error"


class Report(nnx.Variable):
    """A scalar that a layer reported."""


def report(module: nnx.Module, **values: jax.Array) -> None:
    """Reports scalars by name from inside a module's call; the last call of a module counts."""
    # Outside nnx.capture, sow would add attributes to the module, which a loop over tokens cannot
    # carry.
    if not hasattr(module, "__captures__"):
        return
    for name, value in values.items():
        module.sow(Report, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: 0)


def mean_over_layers(reports: Any) -> dict[str, jax.Array]:
    """{name: mean over all layers that reported it} of what `nnx.capture(..., Report)` returned."""
    layers: dict[str, list[jax.Array]] = {}
    for path, variable in nnx.to_flat_state(reports):
        layers.setdefault(str(path[-1]), []).append(jnp.ravel(variable[...]))
    return {name: jnp.mean(jnp.concatenate(v)) for name, v in sorted(layers.items())}


def by_layer(reports: Any, names: Collection[str]) -> dict[str, jax.Array]:
    """{"<name>_<layer>": value} of what the layers of a stack reported by these names, layers
    counted from 0 among those that reported it."""
    places: dict[str, dict[tuple[float, int], jax.Array]] = {}
    flat: Any = nnx.to_flat_state(reports)
    for path, variable in flat:
        name = str(path[-1])
        for part in {"period", "remainder"} & set(path) if name in names else ():
            block = int(path[path.index(part) + 1])
            for repeat, value in enumerate(jnp.ravel(variable[...])):
                row = repeat if part == "period" else math.inf
                places.setdefault(name, {})[row, block] = value
    return {
        f"{name}_{layer}": found[place]
        for name, found in places.items()
        for layer, place in enumerate(sorted(found))
    }


class LayerConstant(nnx.Variable):
    """An array that follows from a layer's index and is never trained.

    A variable and not a Python number, because the layers of a scan are one program: what differs
    between them is data, stacked like their parameters."""


class StepsBefore(nnx.Variable):
    """int32 [], or one for each scanned layer: how many steps of the optimizer came before this
    one, for layers that change by a schedule. 0 without a trainer."""


def set_steps_before(model: nnx.Module, steps: jax.Array) -> None:
    """Tells the layers of a model which step it is; called by the trainer before each."""
    counters = nnx.state(model, StepsBefore)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, steps, leaf.dtype), counters))
