"""Forecasts from the command: dates that go on, units of the series, a figure."""

import csv
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from experiments import forecast, train
from experiments.configs.linear_forecaster import get_config
from experiments.tasks.sources.series import read_series
from experiments.training.run_loading import load_run

FIRST = datetime(2020, 1, 1)


def write(path, rows: int, shift: float = 0.0) -> str:
    lines = ["date,a,b"]
    for hour in range(rows):
        a, b = 100 + 5 * np.sin(hour / 3) + shift, 0.01 * np.cos(hour / 5)
        lines.append(f"{FIRST + timedelta(hours=hour)},{a},{b}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    config: Any = get_config("forecasting,smoke")
    config.task.update({"dataset": write(folder / "own.csv", 200), "context": 12, "horizon": 5})
    config.update({"steps": 2, "seeds": (0, 1)})
    config.optimizer.warmup_steps = 0
    summary = train.run(config, folder / "run", quiet=True)
    assert summary["unit"] == "windows"
    # The summary is that of the best step, and repeating the last row is a forecast, too.
    assert summary["best"]["value"] == pytest.approx(
        np.mean(summary["evaluations"]["validation"]["mse"])
    )
    assert 0 < summary["evaluations"]["test"]["last_mae"][0] < 3
    return folder / "run"


@pytest.mark.slow
def test_a_forecast_goes_on_from_the_last_row_in_the_units_of_the_series(workdir, tmp_path):
    run = load_run(workdir, "best")
    windows = forecast.windows_of(run.config)
    found = forecast.forecast(run, windows, forecast.last_row(windows, None), replica=1)
    assert found.truth is None and found.values.shape == (5, 2)
    forecast.write_csv(found, tmp_path / "forecast.csv")
    head, *rows = csv.reader((tmp_path / "forecast.csv").open())
    assert head == ["date", "a", "b"]
    assert [row[0] for row in rows] == [
        str(FIRST + timedelta(hours=hour)) for hour in range(200, 205)
    ]
    assert all(80 < float(row[1]) < 120 and abs(float(row[2])) < 0.1 for row in rows)
    forecast.draw_forecast(found, tmp_path / "forecast.png")
    assert (tmp_path / "forecast.png").stat().st_size > 5_000

    # Another file is standardised as the run's; with instance norm its level comes back.
    shifted = read_series(write_shifted(tmp_path))
    other = forecast.forecast(run, windows.of(shifted), len(shifted.values) - 1, replica=1)
    np.testing.assert_allclose(other.values[:, 0], found.values[:, 0] + 50, atol=1e-3)


def write_shifted(folder):
    write(folder / "shifted.csv", 200, shift=50.0)
    return folder / "shifted.csv"


@pytest.mark.slow
def test_a_window_of_the_test_comes_with_its_truth(workdir):
    run = load_run(workdir, "best")
    windows = forecast.windows_of(run.config)
    found = forecast.forecast(run, windows, forecast.last_row(windows, 3))
    first = 160 + 3  # 70, 10 and 20 % of 200 rows
    np.testing.assert_array_equal(found.truth, windows.series.values[first : first + 5])
    assert found.dates[0] == windows.series.dates[first]
    with pytest.raises(ValueError, match=r"--window must be in 0..35; got 36"):
        forecast.last_row(windows, 36)


@pytest.mark.slow
def test_a_run_of_another_task_is_refused(workdir):
    config: Any = load_run(workdir).config
    config.task = {"name": "mqar"}
    with pytest.raises(ValueError, match="must hold a run of forecasting; it has learned mqar"):
        forecast.windows_of(config)
