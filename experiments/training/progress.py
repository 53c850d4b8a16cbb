"""What a person watching a run sees: a bar on a terminal, plain lines elsewhere, and warnings apart
from the log lines of libraries."""

import datetime
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PER_DEVICE = "_per_second_per_device"
SILENCE_S = 10.0  # without a bar, a run that has said nothing for this long says what it does
BRIEF_S = 5.0  # between two lines of a brief report


def warn(message: str) -> None:
    """Prints one line on standard error."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr, flush=True)


class ProgressReport:
    """A context around a run of `steps` steps; silent with quiet=True. With brief=True evaluations
    are not told, and steps only when nothing was said for a while: one of many runs."""

    def __init__(self, steps: int, *, quiet: bool = False, brief: bool = False):
        self.start, self.steps, self.quiet, self.brief = 0, steps, quiet, brief
        self.made = self.began = self._spoke = time.monotonic()
        self._doing, self._over = "beginning", threading.Event()
        self._bar: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            bar = Progress(*columns, console=Console(file=sys.stdout))
            self._bar, self._task = (bar, bar.add_task(self._doing, total=steps))

    def __enter__(self) -> "ProgressReport":
        self._over.clear()
        if self._bar is not None:
            self._bar.start()
        elif not self.quiet:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()

    def _break_silence(self) -> None:
        while not self._over.wait(SILENCE_S / 10):
            if time.monotonic() - self._spoke >= SILENCE_S:
                self.say(f"{time.monotonic() - self.made:.0f} s: {self._doing}")

    def doing(self, what: str) -> None:
        """What the run does now, between two steps."""
        self._doing = what
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def begin_at(self, step: int) -> None:
        """The loop begins, after step `step`."""
        self.start = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        self.doing("compiling the training step")

    def advance(self, step: int) -> None:
        """Called after every step; costs nothing worth mentioning."""
        self._doing = f"step {step}/{self.steps}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step == self.start + 1:
            self.began = time.monotonic()  # the first step is mostly compilation

    def say(self, line: str) -> None:
        """A line of its own."""
        self._spoke = time.monotonic()
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
        elif parts and (not self.brief or time.monotonic() - self._spoke >= BRIEF_S):
            done = step - self.start - 1
            remaining = (
                (time.monotonic() - self.began) / done * (self.steps - step) if done > 0 else 0
            )
            eta = datetime.timedelta(seconds=round(remaining))
            self.say("  ".join([f"step {step}/{self.steps}", *parts, f"ETA {eta}"]))
        evaluations = {name.split("/")[0] for name in row if "/" in name} - {"train", "speed"}
        for evaluation in sorted(() if self.brief else evaluations):
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
