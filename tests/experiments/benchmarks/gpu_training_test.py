"""The comparison of training speeds on a GPU, as far as it goes without one: its runs run, its page
shows gaps."""

import json

import pytest

from experiments.benchmarks import gpu_training

SMALL = {
    "model.width": 32,
    "model.depth": 1,
    "task.sequence_length": 64,
    "batch_size": 2,
    "steps": 3,
    "log_every_steps": 1,
}


def test_the_committed_page_is_that_of_the_record():
    path = gpu_training.RESULTS / f"{gpu_training.NAME}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    page = path.with_suffix(".md").read_text()
    assert page == gpu_training.page(record)


def test_it_needs_a_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        gpu_training.report(1, "")


@pytest.mark.slow
def test_a_run_is_a_training_and_the_page_has_its_speed():
    run = next(iter(gpu_training.runs()))
    row = gpu_training.measure(run, SMALL)
    assert row["tokens_per_second"] > 0 and row["parameters"] > 0
    chunked = {**row, "kernels": False, "tokens_per_second": 1.0}
    page = gpu_training.page({"environment": {}, "rows": [row, chunked]})
    (line,) = (x for x in page.splitlines() if x.startswith("| gla | 2,048"))
    speed = row["tokens_per_second"]
    assert line == f"| gla | 2,048 | {speed:,.0f} | 1 | {speed:.2f} |"
    assert "| mamba | 65,536 | not measured | not measured |  |" in page


@pytest.mark.slow
def test_a_run_that_fails_is_a_gap_with_its_reason():
    run = next(iter(gpu_training.runs()))
    row = gpu_training.measure(run, {"model.width": 33})
    assert "width" in row["gap"]
    assert row["gap"] in gpu_training.page({"rows": [row]})
