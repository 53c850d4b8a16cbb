"""Times of ways to cut one sequence over eight virtual devices of a CPU, for tables.

The devices are threads that share the machine's cores. So a time is the work of all devices and
what they cost each other by exchanging. It shows little of a device of a ring that waits for its
neighbour, for the others work meanwhile, and nothing of what a link costs."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import NamedSharding, P

import ops
from experiments.training.checkout import CHECKOUT
from experiments.training.mesh import make_mesh

DEVICES, HEADS, SIZE, ROUNDS = 8, 4, 64, 5
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    # With fewer threads than devices the CPU backend can wait for itself.
    "NPROC": str(2 * DEVICES),
}


def _linear(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return ops.gated_linear_attention(q, k, v)[0]


def _softmax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return ops.window_attention(q, k, v, window=q.shape[1])[0]


# way -> layer, how states or keys travel; None: one device, nothing is cut
WAYS: dict[str, tuple[Callable[..., jax.Array], str | None]] = {
    "LASP-2": (_linear, "all_gather"),
    "LASP, a ring": (_linear, "ring"),
    "pipelined ring": (_linear, "pipelined"),
    "linear, one device": (_linear, None),
    "softmax, LASP-2H": (_softmax, "all_gather"),
    "softmax, ring attention": (_softmax, "ring"),
    "softmax, one device": (_softmax, None),
}


def measure(*, seed: int, length: int) -> dict[str, dict[str, float]]:
    """{"ms" and "ratio": {way: number}} of the layer alone, forward and gradients of q, k and v:
    medians over rounds in which the ways take turns, and their ratios to LASP-2's.

    length: tokens of the one sequence, in 4 heads of 64, float32. Raises ValueError if the devices
    cannot share them."""
    if length < 1 or length % DEVICES:
        raise ValueError(f"length must be a multiple of {DEVICES} tokens; got {length}")
    command = [sys.executable, "-m", "experiments.tables.computations.sequence_timing"]
    done = subprocess.run(
        [*command, str(seed), str(length)],
        cwd=CHECKOUT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _program(way: str, inputs: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """The compiled program of a way with its inputs in place. A call returns when the result is
    there."""
    layer, method = WAYS[way]
    sizes = {"data": 1, "fsdp": 1, "sequence": DEVICES if method else 1, "tensor": 1}
    mesh = make_mesh(sizes, jax.devices()[: sizes["sequence"]])
    placed = jax.device_put(inputs, NamedSharding(mesh, P(None, "sequence")))

    def gradients(*qkv: jax.Array) -> Any:
        return jax.grad(lambda *x: jnp.sum(jnp.sin(layer(*x))), (0, 1, 2))(*qkv)

    with jax.set_mesh(mesh), ops.sequence_method(method) if method else nullcontext():
        compiled = jax.jit(gradients).lower(*placed).compile()
    return lambda: jax.block_until_ready(compiled(*placed))


def time_here(seed: int, length: int) -> dict[str, dict[str, float]]:
    """`measure` in this process, which must have the devices."""
    shape = (1, length, HEADS, SIZE)
    inputs = tuple(
        jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3)
    )
    programs = {way: _program(way, inputs) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for program in programs.values():
        program()
    for _ in range(ROUNDS):
        for way, program in programs.items():
            began = time.perf_counter()
            program()
            times[way].append(1e3 * (time.perf_counter() - began))
    medians = {way: statistics.median(each) for way, each in times.items()}
    first = next(iter(medians.values()))
    return {"ms": medians, "ratio": {way: median / first for way, median in medians.items()}}


if __name__ == "__main__":
    print(json.dumps(time_here(*map(int, sys.argv[1:]))))
