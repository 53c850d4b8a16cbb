"""The training loop on the smallest model there is: what it computes, writes, refuses and
survives."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import train
from experiments.configs import flowformer
from experiments.configs.linear_self_attention import get_config
from experiments.evaluate import evaluate
from experiments.objectives.squared_error import SquaredError
from experiments.training import header, loop, program
from experiments.training.checkout import CHECKOUT
from experiments.training.run_loading import load_run
from experiments.training.task import Examples, Task


def tiny(**overrides: Any) -> Any:
    config: Any = get_config("icl_regression,smoke")
    config.update({"steps": 6, "batch_size": 8, "log_every_steps": 2})
    config.eval.update({"every_steps": 3, "examples": 16})
    config.checkpoint.every_steps = 100
    config.update_from_flattened_dict(overrides)
    return config


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    """The rows, without what depends on the machine."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith("speed/")}
        for row in rows
    ]


def task_with(spoil: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Task:
    """Random prompts whose labels pass through `spoil(labels [n], indices [n])`."""

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = np.stack([np.random.default_rng(index).normal(size=(5, 6)) for index in indices])
        target = spoil(examples[:, -1, -1].copy(), indices)
        examples[:, -1, -1] = 0
        weights = np.ones(len(indices), np.float32)
        return {
            "examples": examples.astype(np.float32),
            "target": target.astype(np.float32),
            "weights": weights,
        }

    clean = Examples(lambda indices: fetch(indices + 10**6))
    return Task({}, lambda seed: Examples(fetch), {"test": clean}, SquaredError())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train.run(tiny(), workdir, quiet=True)


def test_every_step_is_logged_once_with_its_evaluation(finished):
    workdir, _ = finished
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [("train/loss" in row, "in_distribution/loss" in row) for row in rows] == [
        (True, False),
        (False, True),
        (True, False),
        (True, True),
    ]


def test_the_record_says_what_the_run_was(finished):
    workdir, summary = finished
    record = json.loads((workdir / "run.json").read_text())
    assert record["config"]["optimizer"]["lr"] == 1e-2
    assert (
        record["seeds"] == [0]
        and record["parameters"] == 72
        and record["device_count"] == jax.device_count()
    )
    assert len(record["commit"]) == 40 and record["versions"]["jax"] == jax.__version__
    assert summary["parameters"] == 72 and summary["step"] == 6
    prompt = tiny().task.examples + 1
    assert summary["tokens"] == 6 * 8 * prompt
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_says_what_it_is_before_anything_is_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "_begin", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        train.run(tiny(seeds=(0, 3)), tmp_path / "run")
    task, devices, model, data = capsys.readouterr().out.splitlines()
    assert (
        task
        == f"task: icl_regression, 6 steps of 8 examples, seeds 0, 3; results in {tmp_path}/run"
    )
    assert devices == "devices: 1 x cpu (cpu); mesh data=1 fsdp=1 sequence=1 tensor=1"
    assert model.startswith("model: linear_self_attention of no mixers; ")
    assert ", 72 parameters" in model or "; 72 parameters" in model
    assert data.startswith("data: made by the task; ") and data.endswith(" a step")


def test_files_that_data_come_from_are_named_shortly():
    facts = {"text": "file a.txt", "text_bytes": 1234567, "text_sha256": "0123456789abcdef" * 4}
    text = "text file a.txt, text_bytes 1,234,567, text_sha256 0123456789ab"
    assert header.facts(facts) == text


def test_tensorboard_has_the_numbers_of_the_jsonl(finished):
    workdir, _ = finished
    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    logged = [(event.step, event.value) for event in board.Scalars("train/loss")]
    rows = [(row["step"], row["train/loss"][0]) for row in rows_of(workdir) if "train/loss" in row]
    assert [step for step, _ in logged] == [step for step, _ in rows]
    np.testing.assert_allclose(
        [value for _, value in logged], [value for _, value in rows], rtol=1e-6
    )


def test_a_finished_run_is_not_trained_again(finished):
    workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train.run(tiny(), workdir, quiet=True) == summary
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluation_of_the_checkpoint_gives_the_metrics_of_the_last_step(finished):
    workdir, summary = finished
    result = evaluate(load_run(workdir))
    assert result["step"] == 6 and result["decode_max_abs_difference"] is None
    assert result["evaluations"] == summary["evaluations"]


def test_an_evaluation_without_end_is_bounded(finished, tmp_path):
    message = r" must be at most 10000000, as evaluation in_distribution draws .* got 1000000000"
    with pytest.raises(ValueError, match="--examples" + message):
        evaluate(load_run(finished[0]), 10**9)
    with pytest.raises(ValueError, match="config.eval.examples" + message):
        train.run(tiny(**{"eval.examples": 10**9}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_training_lowers_the_loss(tmp_path):
    config = tiny(
        **{
            "steps": 80,
            "batch_size": 64,
            "eval.every_steps": 80,
            "log_every_steps": 20,
            "optimizer.lr": 3e-2,
        }
    )
    train.run(config, tmp_path, quiet=True)
    losses = [row["train/loss"][0] for row in rows_of(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_replica_equals_its_seed_trained_alone(tmp_path):
    together = train.run(tiny(seeds=(3, 8)), tmp_path / "both", quiet=True)
    assert np.shape(together["train"]["loss"]) == (2,)
    assert together["train"]["loss"][0] != together["train"]["loss"][1]
    both = rows_of(tmp_path / "both")
    train.run(tiny(seeds=(8,)), tmp_path / "alone", quiet=True)
    for row, alone in zip(both, rows_of(tmp_path / "alone"), strict=True):
        assert row.keys() == alone.keys()
        for name in row.keys() - {"step"}:
            assert row[name][1] == alone[name][0], name  # on CPUs replicas take turns


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    # Batch 1 (examples 8 .. 15) has a label that is not a number; without it the run is that of the
    # other batches.
    spoiled = task_with(lambda label, index: np.where(index == 9, np.nan, label))
    skipping = task_with(lambda label, index: label)
    examples: Any = spoiled.train(0)

    def without_batch_1(index: np.ndarray) -> dict[str, np.ndarray]:
        return examples.fetch(np.where(index < 8, index, index + 8))

    skipping = dataclasses.replace(skipping, train=lambda seed: Examples(without_batch_1))
    options = {
        "task.name": "stub",
        "eval.best_metric": "test/loss",
        "optimizer.schedule": "constant",
    }
    monkeypatch.setattr(program, "configured_task", lambda config: spoiled)
    rejected = train.run(
        tiny(**options, steps=6, log_every_steps=1), tmp_path / "spoiled", quiet=True
    )
    monkeypatch.setattr(program, "configured_task", lambda config: skipping)
    clean = train.run(tiny(**options, steps=5, log_every_steps=1), tmp_path / "clean", quiet=True)
    assert rejected["rejected_steps"] == [1] and clean["rejected_steps"] == [0]
    rows, expected = rows_of(tmp_path / "spoiled"), rows_of(tmp_path / "clean")
    assert rows[1]["train/loss"] == [None] and rows[1]["train/rejected_steps"] == [1]
    losses = [row["train/loss"] for row in rows if row["step"] != 2]
    assert losses == [row["train/loss"] for row in expected]


def test_a_run_that_only_meets_non_finite_losses_stops_and_says_so(tmp_path, monkeypatch):
    hopeless = task_with(lambda label, index: np.where(index < 16, label, np.inf))
    monkeypatch.setattr(program, "configured_task", lambda config: hopeless)
    config = tiny(
        **{
            "task.name": "stub",
            "eval.best_metric": "test/loss",
            "steps": 50,
            "max_rejected_steps": 4,
        }
    )
    config.eval.every_steps = 50
    with pytest.raises(
        FloatingPointError,
        match=r"seed 0, 4 steps in a row up to step 6 .* lower config.optimizer.lr",
    ):
        train.run(config, tmp_path, quiet=True)
    assert rows_of(tmp_path)[-1]["step"] == 6


@pytest.mark.parametrize("later", [2.0, 1.0])
def test_the_first_best_and_the_newest_checkpoints_are_kept(tmp_path, monkeypatch, later):
    scores = iter([3.0, 1.0, later, 5.0, 4.0, 6.0])
    real = loop.evaluate_task

    def scripted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        return {name: metrics | {"loss": [next(scores)]} for name, metrics in result.items()}

    monkeypatch.setattr(loop, "evaluate_task", scripted)
    config = tiny(**{"eval.every_steps": 1, "checkpoint.every_steps": 1, "checkpoint.keep": 2})
    summary = train.run(config, tmp_path, quiet=True)
    assert summary["best"] == {"step": 2, "value": 1.0}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5", "6"]
    assert load_run(tmp_path, "best").step == 2 and load_run(tmp_path).step == 6


def test_training_can_start_from_another_runs_weights(finished, tmp_path):
    source, _ = finished
    config = tiny(
        **{"init_from": str(source), "optimizer.lr": 1e-12, "steps": 1, "checkpoint.every_steps": 1}
    )
    summary = train.run(config, tmp_path, quiet=True)
    assert summary["step"] == 1
    for old, new in zip(
        jax.tree.leaves(load_run(source).params),
        jax.tree.leaves(load_run(tmp_path).params),
        strict=True,
    ):
        np.testing.assert_allclose(new, old, atol=1e-10)


def test_weights_of_another_shape_are_refused_by_name(finished, tmp_path):
    config = tiny(**{"init_from": str(finished[0]), "task.dimension": 7})
    with pytest.raises(
        ValueError,
        match=(
            r"config.init_from: no parameter of the checkpoint in .* fits this run: w_kq_LEE has"
            r" shape \(1, 6, 6\) there and \(1, 8, 8\) here"
        ),
    ):
        train.run(config, tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_an_encoder_is_refused_where_the_next_token_is_asked_for(tmp_path):
    (tmp_path / "lines.txt").write_text("a line of text\n" * 5000)
    config: Any = flowformer.get_config("text,smoke")
    config.task.path = str(tmp_path / "lines.txt")
    config.model.mixers.flowformer.causal = False
    with pytest.raises(ValueError, match=r"asks for the token that follows, .* set causal=True"):
        train.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_refused_where_classes_are_asked_for(tmp_path):
    config: Any = flowformer.get_config("images,smoke")
    config.task.answer = "class"
    with pytest.raises(ValueError, match=r"model\.name=lm has no head of classes"):
        train.run(config, tmp_path / "run", quiet=True)


def test_a_workdir_of_another_config_is_refused_with_what_differs(finished):
    workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"\(optimizer.lr: 0.01 -> 0.5; steps: 6 -> 7\)"):
        train.run(
            tiny(**{"steps": 7, "optimizer.lr": 0.5, "log_every_steps": 1}), workdir, quiet=True
        )
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_workdir_in_use_is_refused(tmp_path):
    with (
        train.run_record.exclusive(tmp_path),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        train.run(tiny(), tmp_path, quiet=True)


def test_a_profile_is_written_for_the_asked_steps(tmp_path):
    train.run(tiny(profile_steps="2:3", steps=4), tmp_path, quiet=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_bfloat16_is_one_entry_each(tmp_path):
    train.run(tiny(param_dtype="bfloat16", compute_dtype="bfloat16", steps=1), tmp_path, quiet=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_run(tmp_path).params)} == {"bfloat16"}


@pytest.mark.slow
def test_the_command_for_text_of_ones_own_trains(tmp_path):
    commands = re.findall(r"^python -m (?:.*\\\n)*.*$", (CHECKOUT / "README.md").read_text(), re.M)
    (command,) = [
        command for command in commands if "gla.py:text" in command and "task.path" in command
    ]
    _, *arguments = shlex.split(command.replace("\\\n", ""))
    arguments += [
        "--config.steps=2",
        "--config.task.sequence_length=64",
        "--config.eval.examples=8",
    ]
    arguments += [f"--workdir={tmp_path}/run", f"--config.task.data_dir={tmp_path}/data"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "data: text directory ops, " in done.stdout
    assert re.search("^step 2/2  validation: loss ", done.stdout, re.M)
