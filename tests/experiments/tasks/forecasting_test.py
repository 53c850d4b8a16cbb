"""Series from files, their windows, and what is wrong with a file."""

import gzip
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.tasks.forecasting import make
from experiments.tasks.sources.series import calendar_features, read_series, waves
from experiments.training.batches import evaluation_batches, train_batches
from experiments.training.task import Batch, Examples, Task

FIRST = datetime(2020, 2, 27, 22)


def lines_of(rows: int, values: Any = None) -> list[str]:
    values = np.arange(2 * rows).reshape(rows, 2) ** 1.5 if values is None else values
    moments = [FIRST + timedelta(hours=hour) for hour in range(rows)]
    return ["date,a,b", *(f"{m},{x},{y}" for m, (x, y) in zip(moments, values, strict=True))]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def first_windows(task: Task) -> Batch:
    training = task.train(0)
    assert isinstance(training, Examples)
    return training.fetch(np.arange(2))


def test_windows_of_a_file_are_its_rows_standardised_by_the_training_rows(tmp_path):
    values = np.random.default_rng(0).normal(5, 3, (50, 2))
    task = make(write(tmp_path / "own.csv", lines_of(50, values)), context=4, horizon=3)
    assert task.sizes == {"variates": 2, "context": 4, "horizon": 3, "calendar": 4}
    want = (values - values[:35].mean(0)) / values[:35].std(0)
    train = task.train(0)
    parts = {"train": train, **{name: task.evaluations[name] for name in ("validation", "test")}}
    # 70, 10 and 20 % of the rows: the first forecast of a split begins with its first row.
    for name, first, rows in (("train", 4, 31), ("validation", 35, 5), ("test", 40, 10)):
        part: Any = parts[name]
        assert part.length == rows - 3 + 1, name
        batch = part.fetch(np.arange(part.length))
        for i in (0, part.length - 1):
            begin = first + i
            np.testing.assert_allclose(batch["future"][i], want[begin : begin + 3], atol=1e-5)
            np.testing.assert_allclose(batch["history"][i], want[begin - 4 : begin], atol=1e-5)
    assert task.provenance["test_windows"] == 8


def test_no_window_is_dropped_and_training_order_is_a_function_of_the_seed(tmp_path):
    task = make(write(tmp_path / "own.csv", lines_of(50)), context=4, horizon=3)
    scored: Any = task.evaluations["test"]
    batches = list(evaluation_batches(scored, examples=100, batch_size=3))
    assert sum(batch["weights"].sum() for batch in batches) == 8

    def third(skipped: int) -> np.ndarray:
        batches = train_batches(task, seeds=(1,), batch_size=5)
        batches.set_state({"next_index": skipped})
        return [next(batches) for _ in range(3 - skipped)][-1]["history"]

    np.testing.assert_array_equal(third(0), third(2))


@pytest.mark.parametrize(
    ("dataset", "rows", "windows"),
    [("ETTh1", 14_400, (8_449, 2_785, 2_785)), ("exchange", 7_588, (5_120, 665, 1_422))],
)
def test_published_sets_have_the_papers_windows(dataset, rows, windows, tmp_path):
    if dataset == "exchange":  # as published: neither names nor dates
        lines = [f"{row},{row % 7}" for row in range(rows)]
        (tmp_path / "exchange_rate.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        write(tmp_path / f"{dataset}.csv", lines_of(rows + 20))  # more rows than are used
    task = make(dataset, data_dir=str(tmp_path))
    found = [task.provenance[f"{split}_windows"] for split in ("train", "validation", "test")]
    assert tuple(found) == windows


def test_the_exchange_rates_are_days_from_the_first_of_1990(tmp_path):
    (tmp_path / "exchange_rate.txt.gz").write_bytes(gzip.compress(b"1,2\n3,4\n5,6\n"))
    series = read_series(tmp_path / "exchange_rate.txt.gz", start="1990-01-01")
    assert [str(day) for day in series.dates.astype("datetime64[D]")][-1] == "1990-01-03"


def test_calendar_features_are_those_of_the_date():
    moments = [FIRST + timedelta(hours=13 * step) for step in range(200)]
    want = [
        (
            m.hour / 23 - 0.5,
            m.weekday() / 6 - 0.5,
            (m.day - 1) / 30 - 0.5,
            (m.timetuple().tm_yday - 1) / 365 - 0.5,
        )
        for m in moments
    ]
    dates = np.array(moments, "datetime64[s]")
    np.testing.assert_allclose(calendar_features(dates), np.array(want), atol=1e-6)


def test_variates_are_chosen_and_ordered_by_name_and_the_calendar_may_be_left_out(tmp_path):
    path = write(tmp_path / "own.csv", lines_of(50))
    options: Any = {"context": 4, "horizon": 3, "calendar": False}
    both, swapped = make(path, **options), make(path, variates=("b", "a"), **options)
    batch, other = first_windows(both), first_windows(swapped)
    np.testing.assert_array_equal(batch["history"][..., ::-1], other["history"])
    assert "history_calendar" not in batch and swapped.sizes["calendar"] == 0


def test_a_variate_that_stands_still_is_no_division_by_zero(tmp_path):
    values = np.stack((np.full(50, 3.0), np.arange(50)), axis=1)
    task = make(write(tmp_path / "own.csv", lines_of(50, values)), context=4, horizon=3)
    batch = first_windows(task)
    np.testing.assert_array_equal(batch["future"][..., 0], 0)


def changed(place: int, line: str | None) -> list[str]:
    lines = lines_of(50)
    return [*lines[:place], *([] if line is None else [line]), *lines[place + 1 :]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (changed(3, "2020-02-28 00:00:00,1,"), "row 4: b must be a finite number; got ''"),
        (changed(3, "2020-02-28 00:00:00,nan,1"), "row 4: a must be a finite number; got 'nan'"),
        (changed(3, "2020-02-28 00:00:00,1"), "row 4 must have 3 cells; got 2"),
        (changed(3, "28th of May,1,2"), "row 4 must have a date like .*; got '28th of May'"),
        (
            changed(3, "2020-02-27 23:00:00,1,2"),
            "row 4: the date 2020-02-27 23:00:00 is that of row 3 again",
        ),
        (
            changed(3, "2020-02-27 21:00:00,1,2"),
            "row 4: the date 2020-02-27 21:00:00 is before that of row 3; rows must be in order",
        ),
        (changed(3, None), "row 4: the date .* comes 2:00:00 after row 3, where rows are 1:00:00"),
        (changed(0, "day,a,b"), "row 1 must name a column 'date' .*; its columns are day, a, b"),
        (changed(0, "date,a,a"), "row 1 must name each column once; got 'a'"),
        (changed(0, None), "row 1 must name a column"),
        (lines_of(0), "must have two rows of numbers or more; got 0"),
        (lines_of(12), "too few for validation"),
    ],
)
def test_a_wrong_file_is_named_with_its_row(lines, message, tmp_path):
    path = write(tmp_path / "own.csv", lines)
    with pytest.raises(ValueError, match=message) as raised:
        make(path, context=4, horizon=3)
    assert "own.csv" in str(raised.value) and "\n" not in str(raised.value)


def test_rows_with_gaps_are_taken_as_they_follow_each_other_when_asked(tmp_path):
    path = write(tmp_path / "own.csv", changed(3, None))
    assert make(path, context=4, horizon=3, gaps=True).provenance["train_windows"] == 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "ETTh3"}, "task.dataset must be one of ETTh1, .* or a CSV file .*got 'ETTh3'"),
        ({"dataset": "no/such.csv"}, "there is no no/such.csv"),
        ({"data_dir": "no/such"}, "must be a directory with ETTh1.csv .*github.com/zhouhaoyi"),
        (
            {"dataset": "waves", "rows": (10, 10)},
            r"task.rows must be three numbers .*got \(10, 10\)",
        ),
        ({"dataset": "waves", "variates": ("wave_0", "wave_0")}, "must be named once each"),
        ({"dataset": "waves", "variates": ("x",)}, "must be columns of waves, .*; got 'x'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_waves_are_the_same_whoever_asks_and_more_of_them_change_none():
    few, many = waves(3), waves(5)
    np.testing.assert_array_equal(few.values, many.values[:, :3])
