"""What benchmarks measure: every op that has examples, at their shapes, in their variants."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import ops
from ops.framework.examples import Shape, segment_ids


def ops_with_examples() -> tuple[str, ...]:
    """Names of the folders of ops/ that have an examples.py and are ops."""
    folders = (file.parent for file in Path(ops.__path__[0]).glob("*/examples.py"))
    return tuple(sorted(x.name for x in folders if (x / "api.py").exists()))


def examples_of(op: str) -> ModuleType:
    """The op's examples.py, as ops/framework/examples.py describes it."""
    return importlib.import_module(f"ops.{op}.examples")


def has_implementation(op: str, implementation: str) -> bool:
    """Whether the op's folder has a file or folder of this name."""
    return importlib.util.find_spec(f"ops.{op}.{implementation}") is not None


@dataclass(frozen=True)
class Case:
    """One op at one of its shapes, in one variant.

    shape   the shape's name
    sizes   the shape itself
    """

    op: str
    variant: str
    shape: str
    sizes: Shape

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".rstrip()

    @property
    def examples(self) -> ModuleType:
        return examples_of(self.op)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)

    def at(self, shape: str) -> "Case":
        """The same op and variant at another of its shapes."""
        return Case(self.op, self.variant, shape, self.examples.SHAPES[shape])

    def inputs(self, dtype: str) -> dict[str, Any]:
        """The arguments that have gradients, by name."""
        return self.examples.inputs(self.sizes, self.variant, dtype, jax.random.key(0))

    def call(self, implementation: str, segments: bool = False) -> Callable[[dict[str, Any]], Any]:
        """A function of the inputs: what the op returns, without its final state; with `segments`,
        of documents packed into rows, where the op takes segment_ids."""
        options = self.examples.options(self.sizes, self.variant)
        if segments and "segment_ids" in inspect.signature(self.function).parameters:
            options |= {"segment_ids": segment_ids(self.sizes, jax.random.key(9))}
        run = functools.partial(self.function, implementation=implementation, **options)
        return lambda inputs: without_state(run(**inputs))


def without_state(outputs: Any) -> Any:
    """The first of (o, final state), or all that an op without a state returns."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def cases(op: str, shape: str) -> list[Case]:
    """Cases of an op, one per variant, at the shape of this name; none if it has no such shape."""
    examples = examples_of(op)
    if shape not in examples.SHAPES:
        return []
    return [Case(op, variant, shape, examples.SHAPES[shape]) for variant in examples.VARIANTS]


def sum_of_squares(
    function: Callable[[dict[str, Any]], Any],
) -> Callable[[dict[str, Any]], jax.Array]:
    """A loss of the function's outputs, for programs that compute gradients of all inputs."""

    def loss(inputs: dict[str, Any]) -> jax.Array:
        outputs = jax.tree.leaves(function(inputs))
        return sum(jnp.sum(jnp.square(o.astype(jnp.float32))) for o in outputs)  # pyright: ignore

    return loss
