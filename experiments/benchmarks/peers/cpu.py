"""What the CPU benchmark runs beside ours: the chunked forms of jax-linear-attention (Python 3.12,
jax 0.11), where it is installed."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

NAMES = {
    ("gated_linear_attention", "scalar"): "simple_gla",
    ("gated_linear_attention", "vector"): "gla",
    ("delta_rule", "none"): "delta_rule",
    ("delta_rule", "scalar"): "gated_delta_rule",
    ("delta_rule", "vector"): "kda",
}


def check_installed() -> None:
    """Raises ValueError unless the package is installed."""
    if importlib.util.find_spec("jla") is None:
        raise ValueError(
            "--peers needs jax-linear-attention (Python 3.12, jax 0.11): pip install"
            " jax-linear-attention"
        )


def functions(op: str, variant: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The package's form of an op, by the name "jax-linear-attention", as a function of a case's
    inputs; empty where it has none."""
    if (op, variant) not in NAMES:
        return {}
    function = getattr(importlib.import_module("jla.ops.chunked"), NAMES[op, variant])
    order = ("q", "k", "v", "decay_log", "beta")

    def call(inputs: dict[str, Any]) -> Any:
        return function(*(inputs[name] for name in order if name in inputs))[0]

    return {"jax-linear-attention": call}
