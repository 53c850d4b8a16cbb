"""What each engine is handed: resources, arrays, manifests, command lines."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from launch import sweep as sweeps
from launch.backend import Resources, make_resources
from launch.jobset import JobSet
from launch.names import workload_name
from launch.runs import Run, plan
from launch.slurm import Slurm
from launch.xpk import Xpk
from tests.launch import stand_ins
from tests.launch.sweep_test import make_run


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
