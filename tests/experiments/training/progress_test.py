"""What a watcher reads: rows of metrics, lines, a figure, and speeds that mean what they say."""

import json
import time
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.compiled.hardware import peak_flops
from experiments.objectives.objective import Work
from experiments.reporting.figures import draw_losses
from experiments.training import progress, speed
from experiments.training.checkpoints import Best
from experiments.training.metrics import MetricsLog, evaluations_at_best, run_summary
from experiments.training.metrics_file import read_rows
from experiments.training.progress import ProgressReport
from experiments.training.speed import Interval, SpeedMeter, count_weights


def test_rows_after_the_restored_step_are_cut_and_so_is_a_line_without_an_end(tmp_path):
    with MetricsLog(tmp_path, step=0, seeds=(0,)) as log:
        for step in (10, 20, 30):
            log.write({"step": step, "train/loss": [float(step)]})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')
    with MetricsLog(tmp_path, step=20, seeds=(0,)) as log:
        log.write({"step": 30, "train/loss": [0.5]})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "train/loss": [10.0]},
        {"step": 20, "train/loss": [20.0]},
        {"step": 30, "train/loss": [0.5]},
    ]


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, step=0, seeds=(0, 1)) as log:
        log.write({"step": 1, "train/loss": [float("nan"), 2.0], "test/loss": [float("inf"), 1.0]})
    assert read_rows(tmp_path) == [{"step": 1, "train/loss": [None, 2.0], "test/loss": [None, 1.0]}]
    assert draw_losses(tmp_path, (0, 1)).stat().st_size > 1000


def test_the_best_step_has_the_best_mean_over_seeds():
    rows: list[dict[str, Any]] = [
        {"step": 1, "test/accuracy": [0.9, 0.1]},
        {"step": 2, "test/accuracy": [0.6, 0.6]},
        {
            "step": 3,
            "test/accuracy": [None, 1.0],
            "train/loss": [1.0],
            "train/rejected_steps": [2, 0],
        },
    ]
    assert run_summary(rows, Best("test/accuracy", "max"))["best"] == {"step": 2, "value": 0.6}
    assert run_summary(rows, Best("test/accuracy", "min"))["best"] == {"step": 1, "value": 0.5}
    last = {"test": {"accuracy": [None, 1.0]}}
    best = {"test": {"accuracy": [0.6, 0.6]}}
    assert evaluations_at_best(rows, Best("test/accuracy", "max"), last) == best
    assert evaluations_at_best(rows, Best("test/loss", "min"), last) == last
    assert run_summary(rows, Best("", "max"))["best"] is None
    assert run_summary(rows, Best("", "max"))["rejected_steps"] == [2, 0]


def test_without_a_terminal_every_row_is_a_plain_line(capsys):
    with ProgressReport(100) as report:
        report.advance(1)
        speeds = {
            "speed/tokens_per_second_per_device": 12345.6,
            "speed/model_flops_utilisation": 0.412,
        }
        rejected = {"train/rejected_steps": [2, 1]}
        report.report(
            {"step": 50, "train/loss": [2.0, 3.0], **speeds, **rejected, "test/loss": [1.5, 1.5]}
        )
    train, evaluation = capsys.readouterr().out.splitlines()
    assert train.startswith(
        "step 50/100  loss 2.5 [2, 3]  12,346 tokens/s/device  MFU 41.2%  3 steps"
        " rejected (not finite)  ETA 0:00:0"
    )
    assert evaluation == "step 50/100  test: loss 1.5 [1.5, 1.5]"


def test_a_quiet_run_prints_nothing(capsys):
    with ProgressReport(100, quiet=True) as report:
        report.advance(1)
        report.report({"step": 50, "train/loss": [2.0]})
        report.say("something")
    assert capsys.readouterr().out == ""


def test_a_run_that_is_silent_for_long_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE_S", 0.2)
    said: list[str] = []
    with ProgressReport(100) as report:
        report.begin_at(5)
        for expected in ("compiling the training step", "step 6/100", "evaluating"):
            while not any(line.endswith(f" s: {expected}") for line in said):
                time.sleep(0.02)
                said += capsys.readouterr().out.splitlines()
            if expected.startswith("comp"):
                report.advance(6)
            else:
                report.doing("evaluating")
    capsys.readouterr()
    time.sleep(0.5)
    assert capsys.readouterr().out == ""


def test_one_of_many_runs_tells_little(capsys, monkeypatch):
    # Made; too early; late enough, estimated, said.
    clock = iter([0.0, 1.0, 6.0, 9.5, 9.5])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(progress.threading.Thread, "start", lambda thread: None)
    with ProgressReport(100, brief=True) as report:
        for step in (10, 20):
            report.report({"step": step, "train/loss": [2.0], "test/loss": [1.0]})
    assert capsys.readouterr().out == "step 20/100  loss 2  ETA 0:00:40\n"


class Tables(nnx.Module):
    def __init__(self, tied: bool):
        self.embedding = nnx.Param(jnp.ones((100, 8)), out_sharding=("vocabulary", "embed"))
        self.head = (
            None if tied else nnx.Param(jnp.ones((100, 8)), out_sharding=("vocabulary", "embed"))
        )
        self.kernel = nnx.Param(jnp.ones((8, 16)), out_sharding=("embed", "mlp"))


@pytest.mark.parametrize("tied", [True, False])
def test_one_vocabulary_table_counts_whether_it_is_tied_or_not(tied):
    with nnx.use_eager_sharding(False):
        assert count_weights(nnx.state(Tables(tied), nnx.Param)) == (8 * 16, 800)


def test_utilisation_is_model_flops_over_time_and_peak(monkeypatch):
    # Made, compiled (twice), paused, resumed, read.
    clock = iter([0.0, 10.0, 10.0, 14.0, 15.0, 16.0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1000.0)
    with nnx.use_eager_sharding(False):
        meter = SpeedMeter(nnx.state(Tables(True), nnx.Param))
    work = Work("tokens", 10, places=10, outputs=6)
    meter.count(work)
    meter.compiled()
    meter.count(work)
    meter.pause()
    meter.resume()
    interval, flops = meter.take(), 6 * (128 * 10 + 800 * 6)
    assert interval == Interval(steps=1, units=10, flops=flops) and meter.compile_seconds == 10.0
    assert meter.speeds(interval) == {
        "speed/steps_per_second": 1 / 5,
        "speed/tokens_per_second_per_device": 10 / 5,
        "speed/model_flops_utilisation": flops / 5 / 1000,
    }


def test_peaks_are_known_by_device_kind_and_not_guessed():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert (
        peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    )
    assert peak_flops("cpu") is None
