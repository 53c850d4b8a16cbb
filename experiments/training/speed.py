"""Model FLOPs of a training step; over its time and the device's peak, the model FLOPs utilisation.

Counted as usual: 6 floating point operations per weight and token (2 forward, 4 backward), with the
output table only where logits are computed and the input table, a lookup, not at all. The
recurrences' own products and recomputation are left out, so the utilisation is a little too low
rather than too high."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from experiments.compiled.hardware import peak_flops


def count_weights(params: nnx.State) -> tuple[int, int]:
    """(weights that meet every token, weights of the output table) of abstract parameters with
    metadata."""
    body = table = 0
    for _, param in nnx.to_flat_state(params):
        size = math.prod(param.shape)
        if "vocabulary" in (param.get_metadata().get("out_sharding") or ()):
            # Input and output table are equally large, or one and the same.
            table = max(table, size)
        else:
            body += size
    return body, table


@dataclass
class Work:
    """What was done between two rows: steps, tokens, places with logits; over all devices and
    replicas."""

    steps: int = 0
    tokens: int = 0
    targets: int = 0


class SpeedMeter:
    """Speed of training alone: without compilation, evaluation and checkpoints."""

    def __init__(self, params: nnx.State):
        self._body, self._table = count_weights(params)
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._work = Work()
        self._seconds, self._running = 0.0, True
        self._began = self._since = time.monotonic()
        self.compile_seconds = 0.0

    def count(self, batch: Mapping[str, Any]) -> None:
        """Adds a step over `batch`, that of all devices together."""
        self._work.steps += 1
        if "tokens" in batch:
            self._work.tokens += batch["tokens"].size
            self._work.targets += batch["targets"].size

    def compiled(self) -> None:
        """The first step is done: its time was compilation and does not count, nor does the
        step."""
        self.compile_seconds = time.monotonic() - self._began
        self._work = Work()
        self._since = time.monotonic()

    def take(self) -> Work:
        """The work since the last call."""
        work, self._work = self._work, Work()
        return work

    def pause(self) -> None:
        self._seconds += time.monotonic() - self._since
        self._running = False

    def resume(self) -> None:
        self._since, self._running = time.monotonic(), True

    def speeds(self, work: Work) -> dict[str, float]:
        """The "speed/" entries of a row about `work`, just found done; the clock starts again at 0.

        Tokens per second and utilisation are there for batches of tokens, utilisation where the
        peak is known."""
        now = time.monotonic()
        seconds = self._seconds + (now - self._since if self._running else 0.0)
        self._seconds, self._since = 0.0, now
        if not work.steps or seconds <= 0:
            return {}
        row = {"speed/steps_per_second": work.steps / seconds}
        if work.tokens:
            row["speed/tokens_per_second_per_device"] = work.tokens / seconds / jax.device_count()
            if self._peak is not None:
                flops = 6.0 * (self._body * work.tokens + self._table * work.targets)
                row["speed/model_flops_utilisation"] = (
                    flops / seconds / jax.device_count() / self._peak
                )
        return row
