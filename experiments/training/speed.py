"""Model FLOPs of a training step; over its time and the device's peak, the model FLOPs utilisation.

Counted as usual: 6 floating point operations per weight and token (2 forward, 4 backward), with the
output table only where logits are computed and the input table, a lookup, not at all. The
recurrences' own products and recomputation are left out, so the utilisation is a little too low
rather than too high."""

import math
import time
from dataclasses import dataclass

import jax
from flax import nnx

from experiments.compiled.hardware import peak_flops
from experiments.objectives.objective import Work


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


def model_flops(weights: tuple[int, int], work: Work) -> float | None:
    """Floating point operations of a training step with this work by a model with these weights (as
    `count_weights`), or None where the objective does not know how many places meet them."""
    if work.places is None:
        return None
    body, table = weights
    return 6.0 * (body * work.places + table * work.outputs)


@dataclass
class Interval:
    """What was done between two rows: steps, units of work, model FLOPs (None: not known), over all
    devices and replicas."""

    steps: int = 0
    units: float = 0
    flops: float | None = 0.0


class SpeedMeter:
    """Speed of training alone: without compilation, evaluation and checkpoints."""

    def __init__(self, params: nnx.State, replicas: int = 1):
        self._weights, self._replicas = count_weights(params), replicas
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._interval, self._unit = Interval(), ""
        self._seconds, self._running = 0.0, True
        self._began = self._since = time.monotonic()
        self.compile_seconds = 0.0

    def count(self, work: Work) -> None:
        """Adds a step with `work` for each replica, that of all devices together."""
        interval, flops = self._interval, model_flops(self._weights, work)
        interval.steps += 1
        interval.units += self._replicas * work.count
        if flops is None or interval.flops is None:
            interval.flops = None
        else:
            interval.flops += self._replicas * flops
        self._unit = work.unit

    def compiled(self) -> None:
        """The first step is done: its time was compilation and does not count, nor does the
        step."""
        self.compile_seconds = time.monotonic() - self._began
        self._interval = Interval()
        self._since = time.monotonic()

    def take(self) -> Interval:
        """What was done since the last call."""
        interval, self._interval = self._interval, Interval()
        return interval

    def pause(self) -> None:
        self._seconds += time.monotonic() - self._since
        self._running = False

    def resume(self) -> None:
        self._since, self._running = time.monotonic(), True

    def speeds(self, interval: Interval) -> dict[str, float]:
        """The "speed/" entries of a row about `interval`, just found done; the clock starts again
        at 0.

        Steps per second, units of work per second and device (as tokens_per_second_per_device), and
        the utilisation where the model FLOPs and the peak are known."""
        now = time.monotonic()
        seconds = self._seconds + (now - self._since if self._running else 0.0)
        self._seconds, self._since = 0.0, now
        if not interval.steps or seconds <= 0:
            return {}
        devices = jax.device_count()
        row = {
            "speed/steps_per_second": interval.steps / seconds,
            f"speed/{self._unit}_per_second_per_device": interval.units / seconds / devices,
        }
        if self._peak is not None and interval.flops is not None:
            row["speed/model_flops_utilisation"] = interval.flops / seconds / devices / self._peak
        return row
