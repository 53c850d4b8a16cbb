"""Times of separators: every separator of the table is one that can be timed."""

import pytest

from experiments.tables import separation_cost
from experiments.tables.computations import separator_timing


def test_the_table_times_every_separator() -> None:
    assert set(separation_cost.SEPARATORS.values()) == set(separator_timing.SEPARATORS)


@pytest.mark.full
def test_a_step_takes_time_and_seconds_of_sound_are_counted_by_it() -> None:
    step = separator_timing.measure(seed=0, separator="vit", seconds=0.02)["step"]
    assert step["ms"] > 0
    assert step["audio_seconds_per_second"] == pytest.approx(0.02 / (step["ms"] / 1e3))
