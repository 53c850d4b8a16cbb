"""Runs as workloads of xpk, for clusters that xpk made: it builds the JobSets, we give it the
arguments."""

import shlex
import subprocess
from collections.abc import Sequence

from launch.backend import Resources
from launch.jobset import JobSet, kubernetes_name
from launch.runs import Run


class Xpk(JobSet):
    """Submits and cancels through xpk; how things stand, kubectl says, since workloads are JobSets
    of their names."""

    def __init__(self, name: str, resources: Resources):
        resources.need("xpk", "image", "cluster", "project", "zone")
        self.name, self.resources = name, resources
        self._runs: dict[str, str] = {}

    def submit(self, runs: Sequence[Run]) -> None:
        for run in runs:
            _xpk(self.arguments(run))
            self._runs[kubernetes_name(run.name)] = run.name

    def cancel(self) -> None:
        for workload in self._runs:
            where = self._where()
            _xpk(["xpk", "workload", "delete", f"--workload={workload}", *where])

    def render(self, runs: Sequence[Run]) -> str:
        return "\n".join(shlex.join(self.arguments(run)) for run in runs)

    def arguments(self, run: Run) -> list[str]:
        need = self.resources
        return [
            "xpk",
            "workload",
            "create",
            f"--workload={kubernetes_name(run.name)}",
            *self._where(),
            f"--tpu-type={need.tpu}",
            f"--num-slices={need.slices}",
            f"--docker-image={need.image}",
            f"--max-restarts={need.max_restarts}",
            *([f"--priority={need.priority}"] if need.priority else []),
            f"--command={shlex.join(run.command)}",
        ]

    def _where(self) -> list[str]:
        need = self.resources
        return [f"--cluster={need.cluster}", f"--project={need.project}", f"--zone={need.zone}"]


def _xpk(arguments: Sequence[str]) -> None:
    """Raises ValueError with what xpk says if it fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("xpk is not installed, or not on the path") from error
    if done.returncode:
        raise ValueError(f"xpk failed: {(done.stderr or done.stdout).strip()}")
