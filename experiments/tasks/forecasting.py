"""Forecasting of several variates: the next `horizon` rows of a series from the last `context`.

Data sets, splits and standardisation are those of Zhou et al., "Informer", AAAI 2021, arXiv
2012.07436, and Wu et al., "Autoformer", NeurIPS 2021, arXiv 2106.13008, and so of iTransformer and
S-Mamba. Every variate is standardised by mean and standard deviation of the training rows, and
errors are those of standardised values. Windows begin at every row; of validation and test the
first forecast begins with their first row, and so reads rows of the split before. No window is
dropped: papers whose test leaves out a last batch that is not full score other windows.

    history [context, V]              standardised
    history_calendar [context, 4]     hour, weekday, day of month and of year, each in [-1/2, 1/2]
    future [horizon, V]               standardised
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.objectives.forecast_error import ForecastError
from experiments.tasks.sources.series import (
    PUBLISHED,
    Series,
    calendar_features,
    published,
    read_series,
    usual_step,
    waves,
)
from experiments.training.task import Batch, Examples, Length, Task
from models.parts.options import Size

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Windows:
    """A series as windows: standardised values [n, V] and calendar [n, C], float32; mean and scale
    [V] of its training rows; begins: split -> the row at which its first history begins, and the
    number of its windows."""

    series: Series
    values: np.ndarray
    calendar: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    context: int
    horizon: int
    begins: dict[str, tuple[int, int]]

    def fetch(self, first: np.ndarray) -> Batch:
        """The windows whose histories begin at the rows `first` [n]."""
        rows = first[:, None] + np.arange(self.context + self.horizon)
        values = self.values[rows]
        batch = {
            "history": values[:, : self.context],
            "future": values[:, self.context :],
            "weights": np.ones(len(first), np.float32),
        }
        if self.calendar.shape[1]:
            batch["history_calendar"] = self.calendar[rows[:, : self.context]]
        return batch

    def of(self, other: Series) -> "Windows":
        """Another series with the same variates, standardised as this one is; its splits have no
        windows. Raises ValueError if it has other variates or too few rows."""
        chosen = _chosen(other, self.series.names)
        if len(other.values) < self.context:
            raise ValueError(
                f"{other.origin} must have the {self.context} rows of a history; it has"
                f" {len(other.values)}"
            )
        calendar = calendar_features(chosen.dates)[:, : self.calendar.shape[1]]
        values = ((chosen.values - self.mean) / self.scale).astype(np.float32)
        return replace(self, series=chosen, values=values, calendar=calendar, begins={})

    def dates_after(self, last: int) -> np.ndarray:
        """The dates [horizon] of what is forecast from the history whose last row is `last`: those
        of the rows that follow, and further ones as far apart as most rows are."""
        dates = self.series.dates
        known = dates[last + 1 : last + 1 + self.horizon]
        steps = np.arange(1, self.horizon - len(known) + 1)
        return np.concatenate((known, dates[-1] + steps * usual_step(dates)))

    def examples(self, split: str) -> Examples:
        begin, count = self.begins[split]
        return Examples(lambda indices: self.fetch(begin + indices), count)


def make(
    dataset: str = "ETTh1",
    data_dir: str = "~/forecasting",
    context: Length = 96,
    horizon: Length = 96,
    calendar: bool = True,
    variates: tuple[str, ...] = (),
    rows: tuple[Size, ...] = (),
    date_column: str = "date",
    gaps: bool = False,
    waves: Size = 16,
) -> Task:
    """Windows of a series; evaluations "validation" and "test".

    dataset        a published set, by name: ETTh1, ETTh2, ETTm1, ETTm2, exchange; a CSV file (its
                   name has a / or ends in .csv) with a column of dates; or "waves", generated
    data_dir       where the published sets are
    context        rows that are read
    horizon        rows that are forecast, all at once
    calendar       whether dates are read, too
    variates       columns that are read and forecast, in this order; (): all
    rows           of training, validation and test; (): as published, else 70, 10 and 20 %
    date_column    name of the column of dates
    gaps           takes rows as they follow each other where moments are missing
    waves          variates that are generated

    Metrics: those of `ForecastError`, of standardised values.

    Raises ValueError for data that are not there or not as they should be, with file and row."""
    series = find_series(dataset, data_dir, date_column, gaps, waves)
    windows = cut(series, context, horizon, calendar, variates, rows)
    return Task(
        sizes={
            "variates": windows.values.shape[1],
            "context": context,
            "horizon": horizon,
            "calendar": windows.calendar.shape[1],
        },
        train=lambda seed: windows.examples("train"),
        evaluations={split: windows.examples(split) for split in SPLITS[1:]},
        objective=ForecastError(),
        provenance={
            "series": windows.series.origin,
            "series_sha256": windows.series.sha256,
            "variates": list(windows.series.names),
            **{f"{split}_windows": windows.begins[split][1] for split in SPLITS},
        },
    )


def find_series(dataset: str, data_dir: str, date_column: str, gaps: bool, variates: int) -> Series:
    """The series of the options of `make`."""
    if dataset == "waves":
        return waves(variates)
    if dataset in PUBLISHED:
        return published(dataset, data_dir, date_column)
    if "/" in dataset or dataset.endswith(".csv"):
        return read_series(Path(dataset).expanduser(), date_column, gaps=gaps)
    raise ValueError(
        f"task.dataset must be one of {', '.join(PUBLISHED)}, 'waves', or a CSV file with a / in"
        f" its name or .csv at its end; got {dataset!r}"
    )


def cut(
    series: Series,
    context: int,
    horizon: int,
    calendar: bool,
    variates: tuple[str, ...],
    rows: tuple[int, ...],
) -> Windows:
    """The windows of a series, with the options of `make`."""
    series = _chosen(series, variates)
    training, validation, test = _rows(series, rows)
    spans = {
        "train": (0, training),
        "validation": (training - context, validation + context),
        "test": (training + validation - context, test + context),
    }
    begins = {split: (first, n - context - horizon + 1) for split, (first, n) in spans.items()}
    for split, (first, count) in begins.items():
        if count < 1 or first < 0:
            raise ValueError(
                f"task.context={context} and task.horizon={horizon} must leave a window in each"
                f" split; {series.origin} has {training}, {validation} and {test} rows for"
                f" training, validation and test, too few for {split}"
            )
    mean, scale = series.values[:training].mean(axis=0), series.values[:training].std(axis=0)
    scale = np.where(scale == 0, 1.0, scale)  # a variate that stands still stays where it is
    values = ((series.values - mean) / scale).astype(np.float32)
    features = calendar_features(series.dates)[:, : None if calendar else 0]
    return Windows(series, values, features, mean, scale, context, horizon, begins)


def _chosen(series: Series, variates: tuple[str, ...]) -> Series:
    if not variates:
        return series
    if len(set(variates)) < len(variates):
        raise ValueError(f"variates must be named once each; got {', '.join(variates)}")
    for name in variates:
        if name not in series.names:
            raise ValueError(
                f"variates must be columns of {series.origin}, which are"
                f" {', '.join(series.names)}; got {name!r}"
            )
    places = [series.names.index(name) for name in variates]
    return replace(series, names=variates, values=series.values[:, places])


def _rows(series: Series, rows: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows of training, validation and test, which follow each other from the first row on."""
    total = len(series.values)
    chosen = rows or series.rows
    if not chosen:
        training, test = int(0.7 * total), int(0.2 * total)
        return training, total - training - test, test
    if len(chosen) != 3 or sum(chosen) > total:
        raise ValueError(
            f"task.rows must be three numbers (training, validation, test) whose sum is at most the"
            f" {total} rows of {series.origin}; got {chosen}"
        )
    training, validation, test = chosen
    return training, validation, test
