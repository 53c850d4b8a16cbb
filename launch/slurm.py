"""Runs as Slurm job arrays. A preempted or timed-out task gets SIGTERM two minutes early, saves,
and is requeued."""

import re
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence

from experiments.training.checkout import CHECKOUT
from launch.backend import ENDED, QUEUED, RUNNING, Resources
from launch.engine import NoAnswer, Refused, ask, insist, tell
from launch.names import sweep_name
from launch.runs import Run

SECONDS_TO_SAVE = 120
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}
ARRAY_SIZE = 1001  # Slurm's default MaxArraySize
OVER = "Invalid job id"  # what Slurm says of a job that has long ended


class Slurm:
    """The backend `slurm`: job arrays of at most the cluster's MaxArraySize."""

    def __init__(self, name: str, resources: Resources):
        self.name, self.resources = name, resources
        self._tasks: dict[str, str] = {}  # run name -> "<job>_<task>"
        self._states: dict[str, str] = {}  # as far as Slurm has said
        # Job name and runs of an array that may have been submitted: sbatch did not say.
        self._unclear: tuple[str, Sequence[Run]] | None = None

    def submit(self, runs: Sequence[Run]) -> None:
        self._find_unclear()
        left = [run for run in runs if self._states.get(run.name, ENDED) == ENDED]
        for part in self._parts(left):
            # A name of its own, by which it is found if sbatch does not answer.
            job_name = f"{self._job_name(part)}-{secrets.token_hex(3)}"
            options = [f"--job-name={job_name}", *self._after(len(part))]
            self._unclear = job_name, part
            try:
                printed = tell(
                    "sbatch", "--parsable", *options, text=self._script(part), cwd=CHECKOUT
                )
            except Refused:
                self._unclear = None
                raise
            found = re.search(r"^(\d+)(;.*)?$", printed, re.MULTILINE)
            if not found:
                raise NoAnswer(f"sbatch did not say which job it submitted: {printed.strip()!r}")
            self._submitted(found[1], part)

    def states(self) -> dict[str, str]:
        jobs = self._live_jobs()
        listed = _listed(jobs) if jobs else {}
        for name, task in self._tasks.items():
            if self._states[name] != ENDED:
                state = listed.get(task)
                known = QUEUED if state in WAITING else RUNNING
                self._states[name] = ENDED if state is None else known
        return dict(self._states)

    def cancel(self) -> None:
        targets = [[job] for job in self._live_jobs()]
        if self._unclear:
            targets.append([f"--name={self._unclear[0]}"])
        # All that wait first: none of them takes the place of one that ends. USR1 means: save, and
        # do not come back.
        for how in (["--state=PENDING"], ["--batch", "--signal=USR1"]):
            for target in targets:
                insist("scancel", *how, *target, harmless=OVER)

    def render(self, runs: Sequence[Run]) -> str:
        first, *others = [self._script(part) for part in self._parts(runs)]
        note = "# The next array"
        if self.resources.parallel:
            note += ", with sbatch --dependency=afterany:<job of the one before>"
        return "\n".join([first, *(f"{note}\n{script}" for script in others)])

    def _parts(self, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
        size = self.resources.array_size or (_array_size() if len(runs) > 1 else 1)
        for start in range(0, len(runs), size):
            yield runs[start : start + size]

    def _after(self, tasks: int) -> list[str]:
        """What keeps to `parallel` tasks at a time, which Slurm counts for each array: one that
        does not fit beside those before waits for their end."""
        under_way = sum(state != ENDED for state in self._states.values())
        if not self.resources.parallel or not under_way:
            return []
        if under_way + tasks <= self.resources.parallel:
            return []
        return [f"--dependency=afterany:{':'.join(self._live_jobs())}"]

    def _live_jobs(self) -> list[str]:
        live = {
            task.partition("_")[0]
            for name, task in self._tasks.items()
            if self._states[name] != ENDED
        }
        return sorted(live, key=int)

    def _submitted(self, job: str, part: Sequence[Run]) -> None:
        self._tasks |= {run.name: f"{job}_{task}" for task, run in enumerate(part)}
        self._states |= {run.name: QUEUED for run in part}
        self._unclear = None

    def _find_unclear(self) -> None:
        """Looks for an array whose submission was not answered, before it is submitted again."""
        if not self._unclear:
            return
        job_name, part = self._unclear
        listed = _squeue("--states=all", f"--name={job_name}")
        known = {task.partition("_")[0] for task in self._tasks.values()}
        jobs = {task.partition("_")[0] for task in listed} - known
        if jobs:
            self._submitted(min(jobs, key=int), part)
        self._unclear = None

    def _job_name(self, runs: Sequence[Run]) -> str:
        return f"scanax-{sweep_name(self.name, runs[0])}"

    def _script(self, runs: Sequence[Run]) -> str:
        """The batch script of one array."""
        need = self.resources
        limit = f"%{need.parallel}" if need.parallel else ""
        options = [
            f"--job-name={self._job_name(runs)}",
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


def _listed(jobs: Sequence[str]) -> dict[str, str]:
    """{"<job>_<task>": state} of all tasks of `jobs` that have not ended."""
    try:
        return _squeue("--jobs", ",".join(jobs))
    except NoAnswer as problem:
        if OVER not in str(problem):
            raise
    # It does not say which of them; one that ended long ago has no tasks in the queue.
    return {} if not jobs[1:] else {k: v for job in jobs for k, v in _listed([job]).items()}


def _squeue(*options: str) -> dict[str, str]:
    printed = ask("squeue", "--noheader", "--array", "--format=%i %T", *options)
    return dict(re.findall(r"^(\d+_\d+) (\w+)\s*$", printed, re.MULTILINE))


def _array_size() -> int:
    """Tasks that an array may have here; where Slurm cannot be asked, what it has by default."""
    try:
        printed = ask("scontrol", "show", "config")
    except (NoAnswer, Refused):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", printed, re.MULTILINE)
    return max(1, int(found[1])) if found else ARRAY_SIZE
