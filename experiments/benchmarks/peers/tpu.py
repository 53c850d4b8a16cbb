"""Others' TPU kernels beside ours: deltanet-tpu (PyPI; Python 3.12, jax 0.11), where it can be
imported.

Both sides are compiled by the same compiler in the same passes, bfloat16 at K = V = 128 without an
initial state, each as its users call it: forward alone, and forward with the gradients of all
inputs. deltanet-tpu keeps between the two passes what ours recomputes."""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from experiments.benchmarks.ahead_of_time import Shapes, TpuProgram, array
from ops import delta_rule, gated_linear_attention

PEER = "deltanet_tpu"
SIDES = ("ours", PEER)
VARIANTS = ("gla", "delta_rule", "gdn", "kda")
PASSES = ("forward", "forward_and_backward")
GENERATIONS = ("v6e", "v5e")
HEADS, SIZE = 4, 128
CASES = tuple(itertools.product(VARIANTS, PASSES, GENERATIONS))


def name(side: str, variant: str, passes: str, generation: str) -> str:
    return f"peers_{variant}_{passes}_{generation}_{side}"


def names() -> list[str]:
    """Names of all programs, also where the peer cannot be imported."""
    return [name(side, *case) for case in CASES for side in SIDES]


def programs() -> Iterator[TpuProgram]:
    """Programs of both sides in turn; none where theirs cannot be imported."""
    if importlib.util.find_spec(PEER) is not None:
        for case in CASES:
            for side in SIDES:
                yield _program(side, *case)


def _program(side: str, variant: str, passes: str, generation: str) -> TpuProgram:
    def arguments(T: int) -> Shapes:
        x = array(1, T, HEADS, SIZE, dtype="bfloat16")
        rest = {
            "gla": [x],
            "delta_rule": [array(1, T, HEADS, dtype="bfloat16")],
            "gdn": [array(1, T, HEADS, dtype="bfloat16"), array(1, T, HEADS)],
            "kda": [array(1, T, HEADS, dtype="bfloat16"), x],
        }[variant]
        cotangents = [] if passes == "forward" else [x]
        return [x, x, x, *rest, *cotangents]

    call = _ours(variant) if side == "ours" else _theirs(variant, passes == "forward")

    def rule(*inputs: Any) -> Any:
        if passes == "forward":
            return call(*inputs)
        o, pull = jax.vjp(call, *inputs[:-1])
        return o, *pull(inputs[-1])

    return TpuProgram(
        name=name(side, variant, passes, generation),
        generation=generation,
        direction=passes,
        rule=rule if side == "ours" else _as_on_a_tpu(rule),
        arguments=arguments,
        kernels=0,  # theirs to change
        units=HEADS,
    )


def _ours(variant: str) -> Callable[..., jax.Array]:
    op = gated_linear_attention if variant == "gla" else delta_rule
    return lambda *x: op(*x, implementation="pallas_tpu")[0]


def _theirs(variant: str, forward: bool) -> Callable[..., jax.Array]:
    peer = importlib.import_module(PEER)
    options = {"is_inference": True} if forward else {}
    if variant == "gla":
        return functools.partial(peer.chunk_gla, **options)
    if variant == "delta_rule":
        return functools.partial(peer.chunk_delta_rule, **options)
    function = {"gdn": peer.chunk_gdn, "kda": peer.chunk_kda}[variant]
    return lambda q, k, v, beta, g: function(q, k, v, g, beta, **options)


def _as_on_a_tpu(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule as the peer traces it on a TPU: without one it would have its kernels interpreted,
    but here they are to be compiled."""

    def traced(*inputs: Any) -> Any:
        with mock.patch.object(jax, "default_backend", lambda: "tpu"):
            return rule(*inputs)

    return traced
