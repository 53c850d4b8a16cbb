"""Errors of forecasts, against plain means."""

import jax
import numpy as np
import pytest

from experiments.objectives.forecast_error import ForecastError

RNG = np.random.default_rng(0)
BATCH = {
    "history": RNG.standard_normal((3, 5, 2)).astype(np.float32),
    "future": RNG.standard_normal((3, 4, 2)).astype(np.float32),
    "weights": np.array([1, 0, 1], np.float32),
}
FORECAST = RNG.standard_normal((3, 4, 2)).astype(np.float32)
FORECAST[1] = np.nan  # fills up the batch


def test_errors_are_means_over_all_numbers_of_the_windows_that_count():
    value, sums = ForecastError()(lambda history, calendar: FORECAST, BATCH, jax.random.key(0))
    metrics = ForecastError().metrics({name: float(total) for name, total in sums.items()})
    error = (FORECAST - BATCH["future"])[[0, 2]].astype(np.float64)
    last = (BATCH["history"][:, -1:] - BATCH["future"])[[0, 2]].astype(np.float64)
    want = {
        "mse": np.mean(error**2),
        "mae": np.mean(np.abs(error)),
        "last_mse": np.mean(last**2),
        "last_mae": np.mean(np.abs(last)),
    }
    assert metrics == pytest.approx(want, rel=1e-5)
    assert float(value) == pytest.approx(want["mse"], rel=1e-5)


def test_work_is_counted_in_windows_and_a_batch_without_histories_is_refused():
    assert (ForecastError().work(BATCH).unit, ForecastError().work(BATCH).count) == ("windows", 3)
    with pytest.raises(ValueError, match="ForecastError must have 'history'; got tokens"):
        ForecastError().work({"tokens": BATCH["history"]})
