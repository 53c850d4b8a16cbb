"""Where a run's numbers go: metrics.jsonl (training/metrics_file.py says what its lines are) and
TensorBoard."""

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from experiments.objectives.evaluation import Metrics
from experiments.objectives.objective import report_metrics
from experiments.training.checkpoints import Best
from experiments.training.metrics_file import FILE, Row, mean, rows_and_others
from experiments.training.progress import warn
from experiments.training.run_record import writing
from experiments.training.speed import Interval, SpeedMeter

MESSAGES: Any = event_pb2  # whose classes are made when it is loaded


class MetricsLog:
    """Appends rows after `step`; what an interrupted run wrote beyond that step is cut off first,
    so that no step appears twice."""

    def __init__(self, workdir: Path, *, step: int, seeds: Sequence[int], active: bool = True):
        """With active=False nothing is written: of several processes one keeps the log."""
        self._seeds, self._active = seeds, active
        if not active:
            return
        rows, others = rows_and_others(workdir)
        kept = [row for row in rows if row["step"] <= step]
        if others:
            aside = workdir / f"{FILE}.damaged"
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in others)
            warn(f"{workdir / FILE}: moved {len(others)} lines that are no rows to {aside}")
        self._path, partial = workdir / FILE, workdir / f"{FILE}.partial"
        with writing(partial), partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        with writing(workdir / "tensorboard"):
            self._board = Board(workdir / "tensorboard", first=step + 1)

    def write(self, row: Row) -> None:
        """`row`: "step", and numbers or lists of one number per seed."""
        if not self._active:
            return
        with writing(self._path):
            self._file.write(json.dumps(finite(dict(row))) + "\n")
        for name, value in row.items():
            if isinstance(value, list):
                tags = (
                    [name]
                    if len(self._seeds) == 1
                    else [f"{name}/seed_{seed}" for seed in self._seeds]
                )
                for tag, number in zip(tags, value, strict=True):
                    self._board.write(tag, number, row["step"])
            elif name != "step":
                self._board.write(name, value, row["step"])

    def flush(self) -> None:
        """Returns when every row is on disk. Before a checkpoint, so that its step's rows are never
        missing."""
        if not self._active:
            return
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._active:
            return
        try:
            self.flush()
            self._file.close()
            self._board.close()
        except OSError as error:
            # What ended the run counts more than what could not be written after it.
            if kind is None:
                raise
            warn(str(error))


class Board:
    """TensorBoard's events in `folder`, from step `first` on in the place of older ones.

    Written here and now: the thread of the library's own writer dies of a full disk, and whoever
    has more to write then waits for ever."""

    def __init__(self, folder: Path, *, first: int):
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        start = MESSAGES.SessionLog(status=MESSAGES.SessionLog.START)
        self._write(first, session_log=start)

    def write(self, tag: str, number: float, step: int) -> None:
        """A point of the curve `tag`."""
        with writing(self._folder):
            self._write(step, summary=scalar(tag, number))

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(MESSAGES.Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        """Returns when every point is written."""
        with writing(self._folder):
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with writing(self._folder):
            self._events.close()


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def training_row(
    step: int, window: Any, interval: Interval, rates: np.ndarray, meter: SpeedMeter
) -> dict[str, Any]:
    """The row of a window of training steps that ended with `step`; waits until that step is done.
    rates: after n updates."""
    window = jax.tree.map(lambda leaf: np.atleast_1d(np.asarray(leaf)), jax.device_get(window))
    sums, accepted = window["sums"], np.maximum(window["accepted_steps"], 1)
    row: dict[str, Any] = {"step": step}
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # a window of rejected steps alone has no loss
        row["train/loss"] = (sums["loss_sum"] / sums["weight_sum"]).tolist()
        if "correct_sum" in sums:
            row["train/accuracy"] = (sums["correct_sum"] / sums["weight_sum"]).tolist()
        for name, values in report_metrics(sums).items():
            row[f"train/{name}"] = values.tolist()
    row["train/gradient_norm"] = (window["gradient_norm"] / accepted).tolist()
    # Rejected steps do not advance the schedule; step n is the update with the rate after n - 1 of
    # them.
    updates = np.maximum(step - window["rejected_in_all"] - 1, 0)
    row["train/learning_rate"] = [float(rates[count]) for count in updates]
    row["train/rejected_steps"] = window["rejected_steps"].tolist()
    row["train/longest_rejected_run"] = window["longest_rejected_run"].tolist()
    return row | meter.speeds(interval)


def run_summary(rows: Sequence[Row], best: Best) -> dict[str, Any]:
    """What the rows of a whole run say: the last training window, the best evaluation, rejected
    steps, median speed."""
    train = [row for row in rows if "train/loss" in row]
    top = _best_row(rows, best)
    speeds = [row["speed/steps_per_second"] for row in train if "speed/steps_per_second" in row]
    return {
        "train": {
            name.removeprefix("train/"): value
            for name, value in (train[-1].items() if train else ())
            if name.startswith("train/")
        },
        "best": (None if top is None else {"step": top["step"], "value": mean(top[best.metric])}),
        "rejected_steps": (
            np.sum([row["train/rejected_steps"] for row in train], axis=0).tolist()
            if train
            else None
        ),
        "steps_per_second": statistics.median(speeds) if speeds else None,
    }


def evaluations_at_best(
    rows: Sequence[Row], best: Best, evaluations: Mapping[str, Metrics]
) -> dict[str, Metrics]:
    """What the best row has for all metrics of `evaluations`, those of another step; these
    themselves where no row has the metric."""
    top = _best_row(rows, best)
    if top is None:
        return dict(evaluations)
    return {
        name: {metric: top[f"{name}/{metric}"] for metric in metrics}
        for name, metrics in evaluations.items()
    }


def _best_row(rows: Sequence[Row], best: Best) -> Row | None:
    """The first of the rows with the best metric, mean over seeds; None if none has it."""
    scored = [row for row in rows if best.metric in row]
    return max(
        scored, key=lambda row: best.score({best.metric: mean(row[best.metric])}), default=None
    )
