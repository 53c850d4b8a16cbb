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
import yaml

from experiments.reporting import rows
from experiments.reporting.table import Cell, grid
from launch import sweep as sweeps
from launch.backend import Resources, make_resources
from launch.jobset import JobSet
from launch.local import Local
from launch.names import workload_name
from launch.runs import Run, plan
from launch.slurm import Slurm
from launch.xpk import Xpk
from tests.launch import stand_ins

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


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("nothing", "--table must be one of"),
        ("nothing.py", "there is no file nothing.py"),
        ("empty.py", "does not define TITLE, METRIC, SCALES, cells"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, monkeypatch, sweep, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=message):
        sweeps.find_sweep(sweep)


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({}, ["tpu=v9-4"], "tpu must be one of v5litepod-4, .*; got 'v9-4'"),
        ({"cores": 3}, [], "unknown resource 'cores'; known resources: parallel, tpu"),
        ({"gpus": 1}, ["gpus=many"], "resource gpus must be int; got 'many'"),
        ({"spot": 1}, [], "resource spot must be bool; got 1"),
        ({}, ["spot"], "--resources must be key=value; got 'spot'"),
        ({"slices": 0}, [], "slices must be at least 1; got 0"),
    ],
)
def test_impossible_resources_are_named(given, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_resources(given, overrides)


def test_overrides_win_over_the_resources_of_the_sweep():
    assert make_resources({"gpus": 1, "parallel": 4}, ["gpus=2", "spot=true"]) == (
        Resources(gpus=2, parallel=4, spot=True)
    )


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
    for _ in range(2):
        text = sweeps.collect(name, sweep, "tiny", planned, tmp_path / "results")
        assert "| LSA, examples 5 | 0.600 ± 0.141 (n=2) | not run |" in text
        assert len(rows.read(name, tmp_path / "results")) == 1
    (run.workdir / "summary.json").write_text("{")
    assert sweeps.collect(name, sweep, "tiny", planned, tmp_path / "results") == text


def test_an_array_is_no_longer_than_the_cluster_takes_and_keeps_to_its_throttle(
    tmp_path, monkeypatch
):
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, looks=1, MaxArraySize=2)
    runs = [make_run(tmp_path, f"run{i}", "finish()") for i in range(5)]
    backend = Slurm("test", Resources(parallel=2))
    assert re.findall("--array=(.*)", backend.render(runs)) == ["0-1%2", "0-1%2", "0-0%2"]
    assert sweeps.execute(backend, runs, retries=0, poll_s=0.01) == []
    given = [arguments[2:] for arguments in stand_ins.calls(tools, "sbatch")]
    assert given == [[], ["--dependency=afterany:101"], ["--dependency=afterany:101:102"]]
    one = Slurm("test", Resources(array_size=3, parallel=0))
    assert re.findall("--array=(.*)", one.render(runs)) == ["0-2", "0-1"]
    by_default = [make_run(tmp_path, f"run{i}", "") for i in range(1500)]
    monkeypatch.setenv("PATH", "")
    assert re.findall("--array=(.*)", one.render(by_default[:4])) == ["0-2", "0-0"]
    found = re.findall("--array=(.*)", Slurm("test", Resources()).render(by_default))
    assert found == ["0-1000%1", "0-498%1"]


def test_a_slurm_task_that_is_told_to_end_saves_and_is_requeued(tmp_path):
    wait = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("started", flush=True)
time.sleep(60)
"""
    runs = [make_run(tmp_path, "a", "finish()"), make_run(tmp_path, "b", wait)]
    need = Resources(parallel=4, gpus=1, queue="gpu", time="1:00:00")
    script = Slurm("mqar-cpu", need).render(runs)
    for option in ("--array=0-1%4", "--gpus=1", "--partition=gpu", "--time=1:00:00"):
        assert f"#SBATCH {option}\n" in script
    assert "#SBATCH --requeue\n" in script
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n')
    (tools / "scontrol").chmod(0o755)

    def start(task):
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7"}
        environment |= {"SLURM_ARRAY_TASK_ID": str(task)}
        return subprocess.Popen(["bash", "-c", script], env=os.environ | environment)

    assert start(0).wait(60) == 0
    assert runs[0].summary() == {"attempt": 1}
    for told, calls in ((signal.SIGUSR1, ""), (signal.SIGTERM, "requeue 7_1\n")):
        log = runs[1].workdir / "log.txt"
        log.unlink(missing_ok=True)
        task = start(1)
        while not log.exists() or "started" not in log.read_text():
            time.sleep(0.05)
        task.send_signal(told)
        assert task.wait(60) == 143
        record = tmp_path / "scontrol"
        assert (record.read_text() if record.exists() else "") == calls


CLUSTER = Resources(
    tpu="v5litepod-16", slices=2, spot=True, image="img:1", queue="research", priority="low"
)


@pytest.fixture
def manifest(monkeypatch) -> dict:
    monkeypatch.setenv("LOGNAME", "ada")
    run = Run(
        "delta_net_0123456789ab",
        "DeltaNet / width 16",
        Path("/runs/mqar/gpu/delta_net_0123456789ab"),
        ("python", "-m", "experiments.train", "--config.seeds=(0, 1)"),
    )
    (made,) = yaml.safe_load_all(JobSet("mqar-gpu", CLUSTER).render([run]))
    return made


def test_a_jobset_is_gang_scheduled_slices_with_a_pod_per_host(manifest):
    golden = yaml.safe_load((Path(__file__).parent / "data/jobset.yaml").read_text())
    assert manifest == golden


def test_a_jobset_is_valid_for_the_models_of_kubernetes(manifest):
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason='pip install "scanax[clusters]"'
    )
    validate = pytest.importorskip("kubernetes_validate")
    name, sweep = sweeps.find_sweep("experiments/sweeps/mqar.py")
    planned = plan(sweep, name, "tiny", Path("/runs"))
    text = JobSet(f"{name}-tiny", CLUSTER).render([run for run, _ in planned])
    of_sweep = list(yaml.safe_load_all(text))
    assert len(of_sweep) == 12

    def paths(value, prefix=()):
        if isinstance(value, dict):
            return {p for k, v in value.items() for p in paths(v, (*prefix, k))}
        if isinstance(value, list):
            return {p for i, v in enumerate(value) for p in paths(v, (*prefix, i))}
        return {prefix}

    for made in (manifest, *of_sweep):
        known = models.JobsetV1alpha2JobSet.from_dict(made).to_dict()
        assert not paths(made) - paths(known)
        (job,) = made["spec"]["replicatedJobs"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}} | {
            "spec": job["template"]["spec"]
        }
        validate.validate(job, "1.34", strict=True)


def test_backends_that_lack_something_say_what():
    with pytest.raises(ValueError, match="--backend=jobset needs image, queue: set"):
        JobSet("mqar", Resources())
    with pytest.raises(ValueError, match="--backend=xpk needs image, cluster, project"):
        Xpk("mqar", Resources())


def test_xpk_gets_the_command_and_the_slices():
    need = Resources(image="i", cluster="c", project="p", zone="z", slices=2)
    run = Run("gla_0123456789ab", "GLA", Path("/runs/a/b/c"), ("python", "-m", "x y"))
    (line,) = Xpk("mqar", need).render([run]).splitlines()
    assert line.startswith(f"xpk workload create --workload={workload_name(run)} --cluster=c")
    assert "--tpu-type=v5litepod-16 --num-slices=2 --docker-image=i" in line
    assert """'--command=python -m '"'"'x y'"'"''""" in line


@pytest.mark.slow
def test_a_sweep_runs_to_its_table_and_then_has_nothing_to_do(tmp_path):
    (tmp_path / "rates.py").write_text(SWEEP)
    command = [sys.executable, "-m", "launch.sweep", f"--sweep={tmp_path}/rates.py"]
    command += [f"--runs={tmp_path}/runs", "--poll_s=0.2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def sweep(*more):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert sweep("--dry_run").count("experiments.train") == 4
    first = sweep()
    assert "[4/4 done, 0 failed" in first and "not run" not in first
    assert "(n=2)" in first
    assert sweep().startswith("0 runs\nnothing is left to do\n")
    assert sweep("--dry_run") == "# nothing is left to do\n"
