"""How long a computation takes, for tables."""

import time
from collections.abc import Callable
from typing import Any

import jax

ROUNDS = 5


def fastest(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of a few rounds, for what else a machine does only adds time; a first
    one, which may compile, is not counted."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds)
