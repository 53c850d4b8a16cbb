"""Runs as workloads of xpk, for clusters that xpk made: it builds the JobSets, we give it the
arguments."""

import shlex
from collections.abc import Sequence

from launch.backend import Resources
from launch.engine import tell
from launch.jobset import JobSet
from launch.names import workload_name
from launch.runs import Run

TIMEOUT_S = 600.0  # xpk looks at the cluster from all sides before it creates anything


class Xpk(JobSet):
    """Submits through xpk; everything else is kubectl's, since workloads are JobSets of their
    names."""

    def __init__(self, name: str, resources: Resources):
        resources.need("xpk", "image", "cluster", "project", "zone")
        self._begin(name, resources)

    def render(self, runs: Sequence[Run]) -> str:
        return "\n".join(shlex.join(self.arguments(run)) for run in runs)

    def arguments(self, run: Run) -> list[str]:
        need = self.resources
        return [
            "xpk",
            "workload",
            "create",
            f"--workload={workload_name(run)}",
            f"--cluster={need.cluster}",
            f"--project={need.project}",
            f"--zone={need.zone}",
            f"--tpu-type={need.tpu}",
            f"--num-slices={need.slices}",
            f"--docker-image={need.image}",
            f"--max-restarts={need.max_restarts}",
            *([f"--priority={need.priority}"] if need.priority else []),
            f"--command={shlex.join(run.command)}",
        ]

    def _create(self, runs: Sequence[Run]) -> None:
        for run in runs:
            tell(*self.arguments(run), timeout_s=TIMEOUT_S)
