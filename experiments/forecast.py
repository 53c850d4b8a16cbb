"""Forecasts of a trained forecaster, in the units of its series.

    python -m experiments.forecast --workdir=runs/etth1
    python -m experiments.forecast --workdir=runs/etth1 --series=today.csv
    python -m experiments.forecast --workdir=runs/etth1 --window=100

The first forecasts what follows the last row of the run's series, the second what follows that of
another file with the same columns, standardised as the run's series is; the third forecasts a
window of the test, counted from 0, whose truth is known. In the workdir: forecast.csv, a row for
each moment, and forecast.png, history, forecast and, where it is known, truth; --out names another
place for both."""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments.reporting.figures import draw_forecast
from experiments.tasks.forecasting import Windows, cut, find_series
from experiments.tasks.sources.series import read_series
from experiments.training import command_line
from experiments.training.run_loading import LoadedRun, load_run

NAME = "forecasting"


@dataclass(frozen=True)
class Forecast:
    """names [V]; dates and values [L, V] of the history, dates and values [S, V] of the forecast;
    truth [S, V], or None where it is not known. In the units of the series."""

    names: tuple[str, ...]
    history_dates: np.ndarray
    history: np.ndarray
    dates: np.ndarray
    values: np.ndarray
    truth: np.ndarray | None


def windows_of(config: Any) -> Windows:
    """The windows of a run's config. Raises ValueError for a run of another task."""
    options = config.task.to_dict()
    if options.pop("name") != NAME:
        raise ValueError(f"--workdir must hold a run of {NAME}; it has learned {config.task.name}")
    where = ("dataset", "data_dir", "date_column", "gaps", "waves")
    series = find_series(*(options.pop(name) for name in where))
    return cut(series, **options)


def forecast(run: LoadedRun, windows: Windows, last: int, replica: int = 0) -> Forecast:
    """What a replica of the run forecasts from the history whose last row is `last`."""
    rows = slice(last + 1 - windows.context, last + 1)
    calendar = windows.calendar[None, rows] if windows.calendar.shape[1] else None
    model: Any = nnx.merge(run.blueprint.graphdef, *run.replica(replica))
    model.eval()
    future_BSV = jax.jit(lambda model, *inputs: model(*inputs))(
        model, windows.values[None, rows], calendar
    )
    values = np.asarray(future_BSV[0], np.float64) * windows.scale + windows.mean
    truth = windows.series.values[last + 1 : last + 1 + windows.horizon]
    return Forecast(
        names=windows.series.names,
        history_dates=windows.series.dates[rows],
        history=windows.series.values[rows],
        dates=windows.dates_after(last),
        values=values,
        truth=truth if len(truth) == windows.horizon else None,
    )


def write_csv(found: Forecast, path: Path) -> None:
    """A line of names, then one for each moment of the forecast."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("date", *found.names))
        for date, row in zip(found.dates, found.values, strict=True):
            writer.writerow((str(date).replace("T", " "), *(f"{value:.6g}" for value in row)))


def last_row(windows: Windows, window: int | None) -> int:
    """The last row of the history of a test window, or of the series. Raises ValueError for a
    window that is not there."""
    if window is None:
        return len(windows.values) - 1
    first, count = windows.begins.get("test", (0, 0))
    if not 0 <= window < count:
        known = f"in 0..{count - 1}" if count else "left out with --series, which has no test"
        raise ValueError(f"--window must be {known}; got {window}")
    return first + window + windows.context - 1


def main() -> None:
    options = flags.FLAGS
    run = load_run(Path(options.workdir), options.step)
    if not 0 <= options.replica < len(run.seeds):
        raise ValueError(f"--replica must be in 0..{len(run.seeds) - 1}; got {options.replica}")
    windows = windows_of(run.config)
    if options.series:
        task = run.config.task
        path = Path(options.series).expanduser()
        windows = windows.of(read_series(path, task.date_column, gaps=task.gaps))
    last = last_row(windows, options.window)
    began = time.monotonic()
    found = forecast(run, windows, last, options.replica)
    seconds = time.monotonic() - began
    folder = Path(options.out or options.workdir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(found, folder / "forecast.csv")
    draw_forecast(found, folder / "forecast.png")
    print(
        f"{folder / 'forecast.csv'}: {len(found.dates)} rows of {len(found.names)} variates from"
        f" {found.dates[0]} on, {seconds:.1f} s with compilation; forecast.png beside it"
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run of experiments.train.", required=True)
    flags.DEFINE_string("step", "best", "Step of the checkpoint: a number, latest or best.")
    flags.DEFINE_string("series", "", "Another CSV file with the same columns.")
    flags.DEFINE_integer("window", None, "A window of the test, counted from 0.")
    flags.DEFINE_integer("replica", 0, "Which of config.seeds, counted from 0.")
    flags.DEFINE_string("out", "", "Folder of what is written; the workdir if it is left out.")
    command_line.run(main)
