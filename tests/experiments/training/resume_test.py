"""A run that is interrupted, however rudely, ends as if it had not been."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import train
from experiments.configs.linear_self_attention import get_config
from experiments.training.checkout import CHECKOUT
from experiments.training.run_loading import load_run

OVERRIDES: dict[str, Any] = {
    "steps": 60,
    "batch_size": 8,
    "log_every_steps": 3,
    "eval.every_steps": 10,
    "eval.examples": 16,
    "checkpoint.every_steps": 4,
    "seeds": (0, 1),
}


SHORT = {"steps": 12, "eval.every_steps": 6}


def config(**more: Any) -> Any:
    result = get_config("icl_regression,smoke")
    result.update_from_flattened_dict(OVERRIDES | more)
    return result


def start(workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}"]
    command.append("--config=experiments/configs/linear_self_attention.py:icl_regression,smoke")
    command += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def when(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until `condition()` holds; the process must still be running then."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith("speed/")}
        for row in rows
    ]


def params_hash(workdir: Path) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(load_run(workdir).params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def newest_row(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("short")
    train.run(config(**SHORT), workdir, quiet=True)
    return workdir


def interrupt_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    monkeypatch.setattr(
        train.Interruption, "at", lambda _, step: signal.SIGTERM if step == last else None
    )


@pytest.mark.slow
def test_a_run_killed_and_terminated_at_any_moment_ends_to_the_bit_like_one_that_was_not(
    tmp_path_factory,
):
    tmp_path, uninterrupted = (
        tmp_path_factory.mktemp(name) for name in ("interrupted", "uninterrupted")
    )

    def saving() -> list[Path]:
        return list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    chance = random.Random()

    train.run(config(), uninterrupted, quiet=True)

    # Killed while a checkpoint is being written, after at least one whole.
    process = start(tmp_path)
    when(lambda: newest_row(tmp_path) > 4 and saving(), process)
    process.kill()
    process.communicate()

    process = start(tmp_path)  # killed at any moment
    before, further = newest_row(tmp_path), chance.randint(1, 10)
    when(lambda: newest_row(tmp_path) >= min(before + further, 45), process)
    time.sleep(chance.random() * 0.05)
    process.kill()
    process.communicate()

    process = start(tmp_path)  # told to end
    before = len(json.loads((tmp_path / "run.json").read_text())["continued"])
    when(
        lambda: len(json.loads((tmp_path / "run.json").read_text())["continued"]) > before, process
    )
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "SIGTERM: saved step" in printed, printed

    process = start(tmp_path)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    assert params_hash(tmp_path) == params_hash(uninterrupted)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [again["step"] for again in record["continued"]] == sorted(
        again["step"] for again in record["continued"]
    )
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    steps = [event.step for event in board.Scalars("train/loss/seed_1")]
    assert steps == [row["step"] for row in rows_of(tmp_path) if "train/loss" in row]


def test_a_run_goes_on_from_where_it_was_told_to_end(short_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(SystemExit) as ended:
            train.run(config(**SHORT), tmp_path, quiet=True)
    assert ended.value.code == 143 and load_run(tmp_path).step == 7
    train.run(config(**SHORT), tmp_path, quiet=True)
    assert rows_of(tmp_path) == rows_of(short_run)
    assert params_hash(tmp_path) == params_hash(short_run)


def test_a_run_with_a_damaged_newest_checkpoint_goes_on_from_the_one_before(
    short_run, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(SystemExit):
            train.run(config(**SHORT), tmp_path, quiet=True)
    [array] = [
        file for file in (tmp_path / "checkpoints/7/model/d").iterdir() if file.stat().st_size
    ]
    array.write_bytes(array.read_bytes()[:-20])
    train.run(config(**SHORT), tmp_path, quiet=True)
    printed = capsys.readouterr().err
    assert (
        f"warning: damaged checkpoint {tmp_path}/checkpoints/7 (" in printed
        and "going on from step 6" in printed
    )
    assert (tmp_path / "damaged_checkpoints/7/model/d" / array.name).exists()
    # Saved for its evaluation.
    assert json.loads((tmp_path / "run.json").read_text())["continued"][0]["step"] == 6
    assert rows_of(tmp_path) == rows_of(short_run)
    assert params_hash(tmp_path) == params_hash(short_run)


def test_how_often_a_run_logs_and_saves_does_not_change_what_it_computes(
    short_run, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(SystemExit):
            train.run(config(**SHORT), tmp_path, quiet=True)
    other = SHORT | {"log_every_steps": 5, "checkpoint.every_steps": 9, "profile_steps": "6:8"}
    train.run(config(**other), tmp_path, quiet=True)
    assert params_hash(tmp_path) == params_hash(short_run)
