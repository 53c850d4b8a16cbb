"""Sweeps: what is finished is not run again, what fails is retried and then reported, on engines
told little."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.reporting import rows
from experiments.reporting.table import Cell, config_hash, grid
from experiments.training.checkout import DOCUMENTS, RESULTS
from launch import sweep as sweeps
from launch.backend import Resources
from launch.local import Local
from launch.runs import Run, plan

SWEEP = """
from experiments.reporting.table import grid

TITLE, METRIC = "Learning rates", "Risk"
SCALES = {"tiny": "one size", "two": "two sizes"}
RESOURCES = {"parallel": 2, "gpus": 1}


def cells(scale):
    options = {"task.examples": (5, 20), "optimizer.lr": (1e-2, 3e-2)}
    shared = {"steps": 20, "eval.examples": 64, "batch_size": 8}
    return grid("linear_self_attention:icl_regression,smoke", "in_distribution/loss",
                options, row="LSA", seeds=(0, 1), overrides=shared)
"""


def make_run(folder: Path, name: str, code: str) -> Run:
    """A run whose command is Python code with `workdir` and `attempt` (1, 2, ..) in scope."""
    workdir = folder / "sweep" / "cpu" / name
    head = f"""
import json, pathlib, signal, sys, time
workdir = pathlib.Path({str(workdir)!r})
count = workdir / "attempts"
attempt = 1 + len(count.read_text()) if count.exists() else 1
count.write_text("x" * attempt)
def finish(text=json.dumps({{"attempt": attempt}})):
    (workdir / "partial").write_text(text)
    (workdir / "partial").rename(workdir / "summary.json")
"""
    return Run(name, name, workdir, ("python", "-c", head + code))


def test_a_grid_is_every_combination_with_the_last_option_as_columns():
    options = {"model.width": (16, 32), "optimizer.lr": (0.1, 0.2)}
    shared = {"steps": 7, "optimizer.lr": 9.0}
    cells = grid("gla:mqar", "a/b", options, row="GLA", seeds=(3,), overrides=shared)
    assert [(cell.row, cell.column) for cell in cells] == [
        (f"GLA, width {width}", f"lr {lr}") for width in (16, 32) for lr in (0.1, 0.2)
    ]
    chosen = {"steps": 7, "model.width": 32, "optimizer.lr": 0.1}
    assert cells[2] == Cell("GLA, width 32", "lr 0.1", "gla:mqar", "a/b", chosen, seeds=(3,))


def test_a_sweep_file_becomes_commands_that_train_its_configs(tmp_path):
    file = tmp_path / "rates.py"
    file.write_text(SWEEP)
    name, sweep = sweeps.find_sweep(str(file))
    planned = plan(sweep, name, "tiny", tmp_path / "runs")
    assert len({run.name for run, _ in planned}) == 4
    run, (cell,) = planned[1]
    assert run.command[:3] == ("python", "-m", "experiments.train")
    assert run.workdir == tmp_path / "runs" / "rates" / "tiny" / run.name
    assert f"--workdir={run.workdir}" in run.command
    assert "--config.optimizer.lr=0.03" in run.command
    assert "--config.seeds=(0, 1)" in run.command
    config: Any = cell.make_config()
    assert config.optimizer.lr == 0.03


def test_runs_lie_where_the_launcher_looks_for_them_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, table = sweeps.find_sweep("icl_regression")
    for run, _ in plan(table, "icl_regression", "cpu", Path("runs")):
        assert run.workdir.is_relative_to(tmp_path / "runs")
        assert f"--workdir={run.workdir}" in run.command


def test_tables_with_shared_and_computed_cells_have_a_run_per_training(tmp_path):
    _, table = sweeps.find_sweep("icl_regression")
    assert len(plan(table, "icl_regression", "cpu", tmp_path)) == 6  # 10 cells
    _, table = sweeps.find_sweep("ptd_robustness")
    assert plan(table, "ptd_robustness", "cpu", tmp_path) == []


def launch(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a sweep as a user starts it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.sweep", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_is_named_by_row_and_column_and_found_by_its_config(tmp_path):
    (tmp_path / "rates.py").write_text(SWEEP)
    name, sweep = sweeps.find_sweep(f"{tmp_path}/rates.py")
    planned = plan(sweep, name, "tiny", tmp_path)
    hashes = [config_hash(cells[0].make_config()) for _, cells in planned]
    names = [f"lsa_examples_{n}_lr_{rate}" for n in (5, 20) for rate in ("0_01", "0_03")]
    assert [run.name for run, _ in planned] == [
        f"{slug}_{digest}" for slug, digest in zip(names, hashes, strict=True)
    ]
    (tmp_path / "rates" / "tiny" / f"as_it_was_called_{hashes[2]}").mkdir(parents=True)
    assert plan(sweep, name, "tiny", tmp_path)[2][0].name == f"as_it_was_called_{hashes[2]}"


def test_a_run_that_is_killed_is_run_again_and_one_that_cannot_is_reported(tmp_path, capsys):
    runs = [
        make_run(tmp_path, "works", "finish()"),
        make_run(
            tmp_path,
            "killed",
            "import os\nif attempt == 1: os.kill(os.getpid(), signal.SIGKILL)\nfinish()",
        ),
        make_run(tmp_path, "broken", "sys.exit(3)"),
    ]
    backend = Local("test", Resources(parallel=2))
    assert sweeps.execute(backend, runs, retries=1, poll_s=0.05) == ["broken"]
    works, killed, broken = runs
    assert (works.summary(), killed.summary()) == ({"attempt": 1}, {"attempt": 2})
    assert broken.summary() is None
    assert (broken.workdir / "attempts").read_text() == "xx"
    output = capsys.readouterr().out
    assert re.search(r"\[2/3 done, 1 failed.*\]|\[1/3 done, 1 failed.*\]", output)
    assert "killed: ended early, attempt 2" in output
    assert f"failed, see {broken.workdir / 'log.txt'}" in output


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"evaluations": []}', "\xff"])
def test_a_summary_that_is_not_whole_is_the_failure_of_its_run_alone(tmp_path, capsys, text):
    runs = [
        make_run(tmp_path, "whole", "finish()"),
        make_run(tmp_path, "torn", f"finish({text!r})"),
    ]
    runs[1] = replace(runs[1], metrics=("validation/loss",))
    assert sweeps.execute(Local("test", Resources()), runs, retries=0, poll_s=0.05) == ["torn"]
    assert runs[0].summary() == {"attempt": 1}
    assert f"{runs[1].workdir / 'summary.json'} is not" in capsys.readouterr().out


def test_a_summary_that_is_not_whole_yet_is_waited_for(tmp_path):
    slow = """
(workdir / "summary.json").write_text("{")
time.sleep(0.5)
finish()
"""
    run = make_run(tmp_path, "slow", slow)
    assert sweeps.execute(Local("test", Resources()), [run], retries=0, poll_s=0.05) == []


ENDS = {"a mistake": "error: config.steps must be greater than 0; got 0"}
ENDS |= {"the disk": "error: [Errno 28] No space left on device", "a bug": "KeyError: 'x'"}
ENDS |= {"a lock": "error: another process is training in w; wait for it"}


@pytest.mark.parametrize("end", ENDS)
def test_only_what_may_go_away_is_tried_again(tmp_path, capsys, end):
    run = make_run(tmp_path, "fails", f"print({ENDS[end]!r})\nsys.exit(1)")
    assert sweeps.execute(Local("test", Resources()), [run], retries=2, poll_s=0.02) == ["fails"]
    lasting = end == "a mistake"
    assert (run.workdir / "attempts").read_text() == ("x" if lasting else "xxx")
    assert ("it would fail again" in capsys.readouterr().out) == lasting
    assert run.last_error()


def test_an_error_of_an_earlier_attempt_is_not_taken_for_that_of_a_later_one(tmp_path, capsys):
    code = "if attempt == 2: print('error: [Errno 5] Input/output error')\nsys.exit(1)"
    run = make_run(tmp_path, "fails", code)
    run.note_failure("config.steps must be greater than 0; got 0")
    assert sweeps.execute(Local("test", Resources()), [run], retries=2, poll_s=0.02) == ["fails"]
    assert (run.workdir / "attempts").read_text() == "xxx"
    assert "it ended without a summary" in capsys.readouterr().out


def test_a_run_that_lacks_the_metric_of_its_cell_is_not_run_again(tmp_path, capsys):
    summary = json.dumps(dict.fromkeys(rows.FACTS) | SUMMARY)
    run = make_run(tmp_path, "other", f"finish({summary!r})")
    run = replace(run, metrics=("in_distribution/los",))
    assert sweeps.execute(Local("test", Resources()), [run], retries=2, poll_s=0.02) == ["other"]
    assert (run.workdir / "attempts").read_text() == "x"
    has = "summary.json has no metric in_distribution/los; it has in_distribution/loss"
    assert has in capsys.readouterr().out


def test_never_more_runs_than_allowed_and_interruption_lets_them_save(tmp_path):
    wait = """
signal.signal(signal.SIGTERM, lambda *_: ((workdir / "saved").touch(), sys.exit(143)))
(workdir / "started").touch()
time.sleep(60)
"""
    runs = [make_run(tmp_path, f"run{i}", wait) for i in range(3)]

    def started():
        return [(run.workdir / "started").exists() for run in runs]

    def interrupt():
        while sum(started()) < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    backend = Local("test", Resources(parallel=2))
    with pytest.raises(SystemExit) as ended:
        sweeps.execute(backend, runs, retries=1, poll_s=0.05)
    assert ended.value.code == 128 + signal.SIGTERM
    assert started() == [True, True, False]
    assert [(r.workdir / "saved").exists() for r in runs] == [True, True, False]


SUMMARY = {"evaluations": {"in_distribution": {"loss": [0.5, 0.7]}}, "seconds": 9.0}
SUMMARY |= {"versions": {"jax": "1", "flax": "2"}, "commit": "c", "device_count": 1}


def test_finished_runs_become_rows_once_and_the_rest_is_shown_as_missing(tmp_path):
    file = tmp_path / "rates.py"
    file.write_text(SWEEP)
    name, sweep = sweeps.find_sweep(str(file))
    planned = plan(sweep, name, "tiny", tmp_path / "runs")
    run = planned[0][0]
    run.workdir.mkdir(parents=True)
    summary = dict.fromkeys(rows.FACTS) | SUMMARY
    (run.workdir / "summary.json").write_text(json.dumps(summary))
    planned[3][0].note_failure("it was too large")
    for _ in range(2):
        text = sweeps.collect(name, sweep, "tiny", planned, tmp_path / "results")
        assert "| LSA, examples 5 | 0.600 ± 0.141 (n=2) | not run |" in text
        assert "| LSA, examples 20 | not run | failed |" in text
        assert len(rows.read(name, tmp_path / "results")) == 1
    (run.workdir / "summary.json").write_text("{")
    assert sweeps.collect(name, sweep, "tiny", planned, tmp_path / "results") == text


def test_a_table_is_collected_beside_what_is_recorded_and_changes_no_file_of_it(tmp_path):
    name, table = sweeps.find_sweep("icl_regression")
    planned = plan(table, name, "cpu", tmp_path)
    before = {path: path.read_bytes() for path in (*RESULTS.iterdir(), *DOCUMENTS)}
    own, workdirs = rows.places(name, tmp_path)
    assert len(sweeps.lacking(name, "cpu", planned, own)) == len(planned)
    ((run, cells), *_) = planned
    run.workdir.mkdir(parents=True)
    risks = {evaluation: {"loss": [0.5, 0.7]} for evaluation in ("in_distribution", "length_200")}
    summary = dict.fromkeys(rows.FACTS) | SUMMARY | {"evaluations": risks, "device_count": 1}
    (run.workdir / "summary.json").write_text(json.dumps(summary))
    text = sweeps.collect(name, table, "cpu", planned, own)
    (line,) = re.findall(rf"^\| {re.escape(cells[0].row)} +\| {cells[0].column} +\|.*$", text, re.M)
    assert re.search(r"\| \d\.\d+ ± \d.* \(n=2\) +\| 0\.600 ± 0\.141 \(n=2\) +\|$", line)
    assert len(sweeps.lacking(name, "cpu", planned, own)) == len(planned) - 1
    assert workdirs == tmp_path and rows.read(name, tmp_path / name)
    assert {path: path.read_bytes() for path in (*RESULTS.iterdir(), *DOCUMENTS)} == before


@pytest.mark.slow
def test_a_sweep_runs_to_its_table_and_then_has_nothing_to_do(tmp_path):
    (tmp_path / "rates.py").write_text(SWEEP.replace("(1e-2, 3e-2)", "(1e-2,)"))
    asked = [f"--sweep={tmp_path}/rates.py", f"--runs={tmp_path}/runs", "--poll_s=0.2"]

    def sweep(*more):
        status, output, errors = launch(*asked, *more)
        assert status == 0, output + errors
        return output

    assert sweep("--dry_run").count("experiments.train") == 2
    first = sweep()
    assert "[2/2 done, 0 failed" in first and "not run" not in first
    assert "(n=2)" in first
    assert sweep().startswith("0 runs\nnothing is left to do\n")
    assert sweep("--dry_run") == "# nothing is left to do\n"
