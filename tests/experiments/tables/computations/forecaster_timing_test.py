"""Times of forecasters: every encoder of the table is one that can be timed."""

import pytest

from experiments.tables import forecasting_cost
from experiments.tables.computations import forecaster_timing


def test_the_table_times_every_encoder() -> None:
    assert set(forecasting_cost.ENCODERS.values()) == set(forecaster_timing.ENCODERS)


@pytest.mark.slow
def test_a_step_takes_time_and_windows_are_counted_by_it() -> None:
    step = forecaster_timing.measure(seed=0, encoder="s_mamba, one direction", variates=3)["step"]
    assert step["ms"] > 0
    assert step["windows_per_second"] == pytest.approx(1e3 / step["ms"])
