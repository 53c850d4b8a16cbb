"""The benchmark of small runs measures runs, and compares what it says it compares."""

from pathlib import Path

import pytest

from experiments.benchmarks.small_runs import least, line, measure
from experiments.training.checkout import CHECKOUT

CONFIG = "experiments/configs/linear_self_attention.py:icl_regression,smoke"
OURS, OTHERS = Path("ours"), Path("others")
ROWS = [
    (OURS, "cold", {"wall_s": 4.0, "processor_s": 5.0, "step_ms": 2.0}),
    (OTHERS, "cold", {"wall_s": 8.0, "processor_s": 5.0, "step_ms": 6.0}),
    (OURS, "warm", {"wall_s": 1.0, "processor_s": 1.0, "step_ms": 3.0}),
    (OTHERS, "warm", {"wall_s": 3.0, "processor_s": 1.5, "step_ms": 7.0}),
    (OURS, "seeds", {"wall_s": 4.0, "processor_s": 5.0, "step_ms": 5.0}),
    (OTHERS, "seeds", {"wall_s": 4.0, "processor_s": 5.0, "step_ms": 10.0}),
    (OURS, "cold", {"wall_s": 9.0, "processor_s": 4.0, "step_ms": 9.0}),
]


def test_the_least_of_all_rounds_counts_beside_the_other_checkout():
    row = line("gla", least(ROWS, OURS), least(ROWS, OTHERS), seeds=4)
    assert row == (
        "gla | 4.00 (2.00x) | 4.00 (1.25x) | 1.00 (3.00x) | 1.00 (1.50x) | 2.00 (3.00x)"
        " | 5.00 (2.00x) | 0.62"
    )


@pytest.mark.slow
def test_a_run_is_measured_and_leaves_its_programs(tmp_path):
    overrides = ["--config.steps=60", "--config.optimizer.warmup_steps=0"]
    measured = measure(CHECKOUT, CONFIG, tmp_path, overrides)
    assert measured["processor_s"] > 0 and 0 < 60 * measured["step_ms"] < 1000 * measured["wall_s"]
    assert list(tmp_path.glob("*-cache"))


def test_a_run_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"experiments.train .* failed in .*: error: .*steps"):
        measure(CHECKOUT, CONFIG, tmp_path, ["--config.steps=0"])
