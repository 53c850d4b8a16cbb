"""Which implementation of an op runs.

An op is one `jax.custom_vjp` whose forward and backward rules ask here. The choice is made *inside* each rule, by the
platform the
program is lowered for: a program compiled ahead of time for a TPU on a CPU host takes the TPU kernel, and a scan over
layers stores one set of residuals (the inputs), not one per candidate.
"""

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from jax import lax

# What `implementation=None` takes on each platform, where the op has it; everywhere else it takes `chunked`.
PREFERRED = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def check_implementation(op: str, implementation: str | None, modules: Mapping[str, ModuleType]) -> None:
    """Raises unless `implementation` is None, "reference" or one of the op's differentiable implementations."""
    names = ("reference", *modules)
    if implementation is not None and implementation not in names:
        raise ValueError(f"implementation of {op} must be None or one of {', '.join(names)}; got {implementation!r}")


def call(modules: Mapping[str, ModuleType], rule: str, implementation: str | None, *args: Any, **static: Any) -> Any:
    """Runs `rule` ("forward" or "backward") of the chosen implementation on `args` (pytrees of arrays) and `static`.

    A named implementation runs or raises; None takes `PREFERRED` for the lowering platform, else `chunked`.
    """
    rules = {name: functools.partial(getattr(module, rule), **static) for name, module in modules.items()}
    if implementation is not None:
        return rules[implementation](*args)
    kernels = {platform: rules[name] for platform, name in PREFERRED.items() if name in rules}
    if not kernels:
        return rules["chunked"](*args)
    return lax.platform_dependent(*args, default=rules["chunked"], **kernels)


def cast_like(gradients: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Each cotangent in the dtype of its input; None where the input is None."""
    return tuple(None if x is None else g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True))
