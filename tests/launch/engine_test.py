"""Engines that do not answer, or say no: nothing is cancelled, deleted or given twice for that."""

import re
from pathlib import Path

import pytest
import yaml

from launch import execution
from launch.backend import Resources
from launch.engine import Refused, insist
from launch.jobset import JobSet
from launch.names import sweep_name, workload_name
from launch.runs import Run
from launch.slurm import Slurm
from launch.xpk import Xpk
from tests.launch import stand_ins
from tests.launch.sweep_test import make_run

UNREACHED = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
HANDSHAKE = "Unable to connect to the server: net/http: TLS handshake timeout"
KUBERNETES = Resources(image="i", queue="q", cluster="c", project="p", zone="z")


def execute(backend, runs, retries=1):
    return execution.execute(backend, runs, retries=retries, poll_s=0.01)


def two_runs(folder: Path) -> list[Run]:
    runs = [make_run(folder, name, "finish()") for name in ("a", "b")]
    for run in runs:
        run.workdir.mkdir(parents=True, exist_ok=True)
    return runs


def test_a_queue_that_is_not_answered_is_asked_again(tmp_path, monkeypatch, capsys):
    failures = {"squeue": [None, UNREACHED, None, UNREACHED, UNREACHED]}
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, failures=failures)
    runs = two_runs(tmp_path)
    assert execute(Slurm("test", Resources(parallel=2)), runs) == []
    assert [run.summary() for run in runs] == [{"attempt": 1}] * 2
    assert len(stand_ins.calls(tools, "sbatch")) == 1
    assert stand_ins.calls(tools, "scancel") == []
    assert capsys.readouterr().out.count("Unable to contact slurm controller") == 3


@pytest.mark.parametrize("words", [TIMED_OUT, f"+{TIMED_OUT}", "+"])
def test_an_array_is_submitted_once_whether_or_not_sbatch_answers(tmp_path, monkeypatch, words):
    failures = {"sbatch": [words], "squeue": ["slurm_load_jobs error: Unspecified error"]}
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, failures=failures)
    runs = two_runs(tmp_path)
    assert execute(Slurm("test", Resources()), runs) == []
    assert [run.summary() for run in runs] == [{"attempt": 1}] * 2
    assert len(stand_ins.calls(tools, "sbatch")) == (1 if words[0] == "+" else 2)


def test_a_retry_that_is_refused_waits_for_the_others_and_then_fails(tmp_path, monkeypatch, capsys):
    no = "sbatch: error: Job violates accounting/QOS policy (job submit limit)"
    failures = {"sbatch": [None, *[no] * 1000]}
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, looks=1, failures=failures)
    broken = make_run(tmp_path, "broken", "sys.exit(9)")
    runs = [broken, make_run(tmp_path, "works", "finish()")]
    assert execute(Slurm("test", Resources()), runs) == ["broken"]
    assert runs[1].summary() == {"attempt": 1}
    assert stand_ins.calls(tools, "scancel") == []
    assert "job submit limit" in broken.last_error()
    output = capsys.readouterr().out
    assert output.index("(job submit limit); asked again in") < output.index("works: finished")


def test_what_is_refused_from_the_start_ends_the_sweep_with_the_reason(tmp_path, monkeypatch):
    no = "sbatch: error: invalid partition specified: gpuu"
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, failures={"sbatch": [no]})
    with pytest.raises(Refused, match=r"sbatch refused: .* invalid partition specified: gpuu"):
        execute(Slurm("test", Resources()), two_runs(tmp_path))
    assert stand_ins.calls(tools, "scancel") == []


def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for backend, command in (Slurm, "sbatch"), (JobSet, "kubectl"), (Xpk, "kubectl"):
        with pytest.raises(Refused, match=f"{command} is not installed, or not on the path"):
            execute(backend("test", KUBERNETES), two_runs(tmp_path))


@pytest.mark.parametrize("verb", ["get", "apply", "+apply"])
def test_jobsets_outlive_a_cluster_that_does_not_answer(tmp_path, monkeypatch, capsys, verb):
    words = [None, HANDSHAKE, HANDSHAKE] if verb == "get" else [f"{verb[:-5]}{HANDSHAKE}"]
    failures = {f"kubectl {verb.removeprefix('+')}": words}
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, failures=failures)
    runs = two_runs(tmp_path)
    assert execute(JobSet("test", KUBERNETES), runs) == []
    assert [run.summary() for run in runs] == [{"attempt": 1}] * 2
    made = stand_ins.calls(tools, "kubectl")
    assert not [call for call in made if call[0] == "delete"]
    assert sum(call[0] == "apply" for call in made) == (2 if verb == "apply" else 1)
    assert "TLS handshake timeout; asked again in" in capsys.readouterr().out


def jobset(run: Run, conditions: list[str]) -> dict:
    (item,) = yaml.safe_load_all(JobSet("test", KUBERNETES).render([run]))
    true = [{"type": condition, "status": "True"} for condition in conditions]
    return item | {"status": {"conditions": true}}


def test_a_jobset_that_lives_is_left_alone_and_one_that_is_over_makes_room(
    tmp_path, monkeypatch, capsys
):
    runs = two_runs(tmp_path)
    names = [workload_name(run) for run in runs]
    items = [jobset(runs[0], ["Suspended"]), jobset(runs[1], ["Failed"])]
    found = {"somebody-elses": jobset(runs[0], []) | {"metadata": {"name": "somebody-elses"}}}
    found |= dict(zip(names, items, strict=True))
    tools = stand_ins.install(tmp_path / "tools", monkeypatch, looks=10**6, jobsets=found)
    backend = JobSet("test", KUBERNETES)
    backend.submit(runs)
    made = stand_ins.calls(tools, "kubectl")
    assert [call[-1] for call in made if call[0] == "delete"] == [names[1]]
    assert stand_ins.jobsets(tools)[names[0]]["status"] == items[0]["status"]
    assert "status" not in stand_ins.jobsets(tools)[names[1]]
    assert f"a: is queued or runs already, as {names[0]}" in capsys.readouterr().out
    backend.cancel()
    assert set(stand_ins.jobsets(tools)) == {"somebody-elses"}


def test_a_failed_jobset_leaves_its_output_in_the_log_of_the_run(tmp_path, monkeypatch):
    stand_ins.install(tmp_path / "tools", monkeypatch, looks=1)
    code = "print('error: config.steps must be greater than 0; got 0')\nprint('bye')\nsys.exit(1)"
    run = make_run(tmp_path, "broken", code)
    run.workdir.mkdir(parents=True)
    assert execute(JobSet("test", KUBERNETES), [run]) == ["broken"]
    assert (run.workdir / "attempts").read_text() == "x"
    assert run.last_error() == "error: config.steps must be greater than 0; got 0"


def test_names_are_unique_to_sweep_scale_user_and_folder_and_valid_everywhere(monkeypatch):
    def names(root="/runs", sweep="rates", scale="tiny", user="ada"):
        monkeypatch.setenv("LOGNAME", user)
        workdir = Path(root, sweep, scale, "lsa_0123456789ab")
        run = Run("lsa_0123456789ab", "LSA", workdir, ())
        return workload_name(run), sweep_name(f"{sweep}-{scale}", run)

    others = [{"root": "/mine"}, {"sweep": "学習率"}, {"sweep": "学", "scale": "率"}]
    others += [{"scale": "gpu"}, {"user": "grace"}, {"sweep": "my sweep!"}, {"sweep": "x" * 300}]
    found = [names(**other) for other in ({}, *others)]
    assert names() == found[0]
    for kind, longest in (0, 39), (1, 63):
        each = [pair[kind] for pair in found]
        assert len(set(each)) == len(each)
        assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])", name) for name in each)
        assert max(map(len, each)) <= longest
    assert all(name.startswith("lsa-0123456789ab-") for name, _ in found)


def test_a_job_of_slurm_is_named_in_letters_that_a_script_can_hold(tmp_path):
    (run, _) = two_runs(tmp_path)
    script = Slurm("学習率 of mine-tiny", Resources()).render([run])
    assert re.search(r"^#SBATCH --job-name=scanax-of-mine-tiny-[0-9a-f]{8}$", script, re.MULTILINE)


def test_what_cannot_be_stopped_is_said(tmp_path, monkeypatch, capsys):
    stand_ins.install(tmp_path / "tools", monkeypatch, failures={"scancel": [UNREACHED] * 3})
    insist("scancel", "101", pauses_s=(0.0, 0.0))
    assert "connect failure); runs may go on: scancel 101" in capsys.readouterr().out
    insist("scancel", "101", pauses_s=(0.0, 0.0))
    assert capsys.readouterr().out == ""
