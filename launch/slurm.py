"""Runs as one Slurm job array. A preempted or timed-out task gets SIGTERM two minutes early, saves,
and is requeued."""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from experiments.training.checkout import CHECKOUT
from launch.backend import ENDED, QUEUED, RUNNING, Resources
from launch.runs import Run

SECONDS_TO_SAVE = 120
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}


class Slurm:
    """The backend `slurm`: one job array."""

    def __init__(self, name: str, resources: Resources):
        self.name, self.resources = name, resources
        self._tasks: dict[str, str] = {}  # run name -> "<job>_<task>"

    def submit(self, runs: Sequence[Run]) -> None:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=self.render(runs),
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
        )
        if done.returncode:
            raise ValueError(f"sbatch refused the sweep: {done.stderr.strip()}")
        job = done.stdout.strip().partition(";")[0]
        self._tasks |= {run.name: f"{job}_{task}" for task, run in enumerate(runs)}

    def states(self) -> dict[str, str]:
        jobs = sorted({task.partition("_")[0] for task in self._tasks.values()})
        listed: dict[str, str] = {}
        if jobs:
            done = subprocess.run(
                ["squeue", "--noheader", "--array", "--format=%i %T", "--jobs", ",".join(jobs)],
                capture_output=True,
                text=True,
            )
            # A job that is long over is an invalid id to squeue, which is what ENDED means.
            listed = dict(line.split() for line in done.stdout.splitlines())
        states = {}
        for name, task in self._tasks.items():
            state = listed.get(task)
            states[name] = ENDED if state is None else QUEUED if state in WAITING else RUNNING
        return states

    def cancel(self) -> None:
        jobs = sorted({task.partition("_")[0] for task in self._tasks.values()})
        if jobs:
            subprocess.run(["scancel", "--state=PENDING", *jobs])
            # USR1 means: save, and do not come back.
            subprocess.run(["scancel", "--batch", "--signal=USR1", *jobs])

    def render(self, runs: Sequence[Run]) -> str:
        need = self.resources
        limit = f"%{need.parallel}" if need.parallel else ""
        options = [
            f"--job-name=scanax-{self.name}",
            f"--array=0-{len(runs) - 1}{limit}",
            "--requeue",
            "--open-mode=append",
            "--output=/dev/null",
            f"--signal=B:TERM@{SECONDS_TO_SAVE}",
            *([f"--partition={need.queue}"] if need.queue else []),
            *([f"--time={need.time}"] if need.time else []),
            *([f"--cpus-per-task={need.cpus}"] if need.cpus else []),
            *([f"--gpus={need.gpus}"] if need.gpus else []),
            *([f"--mem={need.memory}"] if need.memory else []),
        ]
        # The shell waits for the run in the background: so it can pass the signal on while it
        # waits, and requeue.
        rows = [
            f"  {task}) workdir={shlex.quote(str(run.workdir.absolute()))};"
            f" run=({shlex.join([sys.executable, *run.command[1:]])}) ;;"
            for task, run in enumerate(runs)
        ]
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {option}" for option in options),
                f"cd {shlex.quote(str(CHECKOUT))}",
                "case $SLURM_ARRAY_TASK_ID in",
                *rows,
                "esac",
                'mkdir -p "$workdir"',
                '"${run[@]}" >> "$workdir/log.txt" 2>&1 &',
                "child=$!",
                "told=",
                "trap 'told=TERM; kill -TERM $child' TERM",
                "trap 'told=USR1; kill -TERM $child' USR1",
                "wait $child; status=$?",
                '[ -n "$told" ] && { wait $child; status=$?; }',
                "# 143: the run was told to end and saved.",
                'if [ "$told" = TERM ] && [ $status -eq 143 ]; then',
                '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
                "fi",
                "exit $status",
                "",
            ]
        )
