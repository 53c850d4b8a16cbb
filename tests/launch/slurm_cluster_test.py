"""A sweep on a real Slurm of two nodes on this machine: an array, a task that is preempted, and all
rows at the end.

Opt-in, because it needs root and `apt-get install slurm-wlm munge`:

    python -m pytest tests/launch/slurm_cluster_test.py -m cluster
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.training.checkout import CHECKOUT
from launch import engine
from launch import sweep as sweeps
from launch.backend import Resources
from launch.slurm import Slurm
from tests.launch.sweep_test import make_run

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=scanax
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SlurmUser=root
SlurmdParameters=config_overrides
ReturnToService=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=w[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2
MaxArraySize=6
PartitionName=all Nodes=w[1-2] Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, DAEMONS)),
        reason="needs root, and slurm-wlm and munge of Debian",
    ),
]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two nodes in a folder of their own; all daemons end with the test."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "state").mkdir()
    port = 20_000 + os.getpid() % 10_000
    text = CONFIG.format(folder=folder, port=port, first=port + 1, second=port + 2)
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    processes = []

    def start(*command):
        with (folder / f"{command[0]}.out").open("ab") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))

    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("log", "pid", "seed")]
    start(
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={folder}/munge.socket",
        *files,
    )
    start("slurmctld", "-D")
    controller = processes[-1]
    for node in ("w1", "w2"):
        start("slurmd", "-D", "-N", node)
    try:
        deadline = time.monotonic() + 60
        while "idle 2" not in _output("sinfo", "--noheader", "--format=%t %D"):
            logs = "\n".join(p.read_text() for p in folder.glob("*.out"))
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)
        yield controller
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(30)


def _output(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


SAVES = """
import os
def told(number, frame):
    (workdir / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, told)
(workdir / "started").touch()
if attempt == 1:
    time.sleep(120)
finish()
"""


@pytest.mark.timeout(400)
def test_a_preempted_task_saves_is_requeued_and_the_sweep_ends_complete(cluster, tmp_path, capsys):
    runs = [make_run(tmp_path, f"run{i}", "finish()") for i in range(3)]
    runs.append(make_run(tmp_path, "preempted", SAVES))
    runs.append(make_run(tmp_path, "fails_once", "attempt == 1 and sys.exit(9)\nfinish()"))
    told = []

    class Preempting(Slurm):
        """Slurm that preempts a task as soon as it runs: what a higher partition or a time limit
        does."""

        def states(self):
            if not told and (runs[3].workdir / "started").exists():
                told.append(
                    _output("scancel", "--batch", "--signal=TERM", self._tasks["preempted"])
                )
            return super().states()

    backend = Preempting("test", Resources(parallel=3))
    assert sweeps.execute(backend, runs, retries=1, poll_s=0.5) == []
    assert [(run.summary() or {}).get("attempt") for run in runs] == [1, 1, 1, 2, 2]
    assert told and (runs[3].workdir / "saved").exists()
    assert "[5/5 done, 0 failed" in capsys.readouterr().out


@pytest.mark.timeout(1800)
def test_a_sweep_file_of_twelve_rows_runs_to_its_table_with_one_killed(cluster, tmp_path):
    """Real training: the sweep file that runs on every backend. SIGKILL leaves no time to save."""
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "launch.sweep", "--backend=slurm"]
    command += ["--sweep=experiments/sweeps/mqar.py", "--scale=tiny", f"--runs={runs}"]
    command += ["--resources=parallel=2"]
    sweep = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    while sweep.poll() is None:
        begun = list(runs.glob("mqar/tiny/gla_*/checkpoints"))
        if begun:
            _output("pkill", "-KILL", "-f", f"workdir=.*{begun[0].parent.name}")
            break
        time.sleep(0.5)
    output, _ = sweep.communicate()
    assert sweep.returncode == 0, output
    assert begun and "ended early, attempt 2" in output
    assert "12 of 12 cells" in output


def test_arrays_are_cut_and_a_controller_that_is_frozen_for_a_while_ends_nothing(
    cluster, tmp_path, capsys, monkeypatch
):
    """Nobody answers while it is stopped; what it was told meanwhile it does afterwards."""
    monkeypatch.setattr(engine, "TIMEOUT_S", 3.0)
    runs = [make_run(tmp_path, f"run{i}", "time.sleep(8)\nfinish()") for i in range(8)]
    runs[7] = make_run(tmp_path, "run7", "attempt == 1 and sys.exit(9)\nfinish()")

    def freeze():
        while not (runs[0].workdir / "attempts").exists():
            time.sleep(0.1)
        cluster.send_signal(signal.SIGSTOP)
        time.sleep(20)
        cluster.send_signal(signal.SIGCONT)

    threading.Thread(target=freeze).start()
    backend = Slurm("test", Resources(parallel=4))
    assert sweeps.execute(backend, runs, retries=1, poll_s=0.5) == []
    assert [(run.summary() or {}).get("attempt") for run in runs] == [1] * 7 + [2]
    assert "asked again in" in capsys.readouterr().out
    assert len({task.partition("_")[0] for task in backend._tasks.values()}) == 3


def test_interrupting_a_sweep_lets_its_tasks_save_and_leaves_nothing(cluster, tmp_path):
    run = make_run(tmp_path, "waits", SAVES)
    backend = Slurm("test", Resources())
    backend.submit([run])
    deadline = time.monotonic() + 60
    while not (run.workdir / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    backend.cancel()
    while _output("squeue", "--noheader").strip():
        assert time.monotonic() < deadline + 60, _output("squeue")
        time.sleep(0.2)
    assert (run.workdir / "saved").exists() and run.summary() is None
    assert (run.workdir / "log.txt").exists()
