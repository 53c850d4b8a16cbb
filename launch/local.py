"""Runs on this machine, `parallel` at a time, each a process of its own with its output in log.txt
of its workdir."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from experiments.training.checkout import CHECKOUT
from launch.backend import ENDED, QUEUED, RUNNING, Resources
from launch.runs import Run

GRACE_S = 120  # a run that is told to end finishes its step and writes a checkpoint


class Local:
    """The backend `local`: processes on this machine, `resources.parallel` at a time."""

    def __init__(self, name: str, resources: Resources):
        self.parallel = max(1, resources.parallel)
        self._queue: list[Run] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, runs: Sequence[Run]) -> None:
        states = self.states()
        self._queue += [run for run in runs if states.get(run.name, ENDED) == ENDED]
        self._fill()

    def states(self) -> dict[str, str]:
        self._fill()
        states = {
            name: RUNNING if process.poll() is None else ENDED
            for name, process in self._processes.items()
        }
        return states | {run.name: QUEUED for run in self._queue}

    def cancel(self) -> None:
        self._queue.clear()
        running = [p for p in self._processes.values() if p.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def render(self, runs: Sequence[Run]) -> str:
        return "\n".join(shlex.join(run.command) for run in runs)

    def _fill(self) -> None:
        running = sum(process.poll() is None for process in self._processes.values())
        while self._queue and running < self.parallel:
            run = self._queue.pop(0)
            run.workdir.mkdir(parents=True, exist_ok=True)
            # The interpreter of the sweep runs the rows; in sessions of their own, Ctrl-C reaches
            # the sweep alone.
            with (run.workdir / "log.txt").open("ab") as log:
                self._processes[run.name] = subprocess.Popen(
                    [sys.executable, *run.command[1:]],
                    cwd=CHECKOUT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running += 1
