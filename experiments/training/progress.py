"""What a person watching a run sees: a bar on a terminal, plain lines elsewhere, and warnings apart
from the log lines of libraries."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PER_DEVICE = "_per_second_per_device"


def warn(message: str) -> None:
    """Prints one line on standard error."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


class ProgressReport:
    """A context around a training loop from step `start` to step `steps`; silent with
    quiet=True."""

    def __init__(self, start: int, steps: int, *, quiet: bool = False):
        self.start, self.steps, self.quiet = start, steps, quiet
        self.began = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            bar = Progress(*columns, console=Console(file=sys.stdout))
            self._bar, self._task = (bar, bar.add_task("compiling", total=steps, completed=start))

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Called after every step; costs nothing worth mentioning."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step == self.start + 1:
            self.began = time.monotonic()  # the first step is mostly compilation

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            print(line, flush=True)

    def report(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl in short: training loss and speed; evaluations get a line each."""
        step, parts = row["step"], []
        if "train/loss" in row:
            parts.append(f"loss {spread(row['train/loss'])}")
        speed = next((name for name in row if name.endswith(PER_DEVICE)), None)
        if speed is not None:
            unit = speed.removeprefix("speed/").removesuffix(PER_DEVICE)
            parts.append(f"{row[speed]:,.0f} {unit}/s/device")
        elif row.get("speed/steps_per_second"):
            parts.append(f"{row['speed/steps_per_second']:.3g} steps/s")
        if row.get("speed/model_flops_utilisation"):
            parts.append(f"MFU {row['speed/model_flops_utilisation']:.1%}")
        if rejected := sum(row.get("train/rejected_steps", ())):
            parts.append(f"{rejected} steps rejected (not finite)")
        if parts and self._bar is not None:
            self._bar.update(self._task, description="  ".join(parts))
        elif parts:
            done = step - self.start - 1
            remaining = (
                (time.monotonic() - self.began) / done * (self.steps - step) if done > 0 else 0
            )
            eta = datetime.timedelta(seconds=round(remaining))
            self.say("  ".join([f"step {step}/{self.steps}", *parts, f"ETA {eta}"]))
        evaluations = {name.split("/")[0] for name in row if "/" in name} - {"train", "speed"}
        for evaluation in sorted(evaluations):
            values = [
                f"{name.split('/')[1]} {spread(value)}"
                for name, value in row.items()
                if name.startswith(f"{evaluation}/")
            ]
            self.say(f"step {step}/{self.steps}  {evaluation}: {'  '.join(values)}")


def spread(values: list[float]) -> str:
    """One number, or the mean and the range of several."""
    mean = sum(values) / len(values)
    return (
        f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} [{min(values):.4g}, {max(values):.4g}]"
    )
