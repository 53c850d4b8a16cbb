"""What a backend is: an engine that exists, told to start, asked how things stand, told to stop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from launch.runs import Run

QUEUED, RUNNING, ENDED = "queued", "running", "ended"

# TPU slices by their name in Google Cloud: node selector of the accelerator, topology, hosts; four
# chips per host.
TPUS = {
    "v5litepod-4": ("tpu-v5-lite-podslice", "2x2", 1),
    "v5litepod-16": ("tpu-v5-lite-podslice", "4x4", 4),
    "v5litepod-64": ("tpu-v5-lite-podslice", "8x8", 16),
    "v5litepod-256": ("tpu-v5-lite-podslice", "16x16", 64),
    "v5p-8": ("tpu-v5p-slice", "2x2x1", 1),
    "v5p-16": ("tpu-v5p-slice", "2x2x2", 2),
    "v5p-32": ("tpu-v5p-slice", "2x2x4", 4),
    "v5p-128": ("tpu-v5p-slice", "4x4x4", 16),
    "v6e-4": ("tpu-v6e-slice", "2x2", 1),
    "v6e-16": ("tpu-v6e-slice", "4x4", 4),
    "v6e-64": ("tpu-v6e-slice", "8x8", 16),
    "v6e-256": ("tpu-v6e-slice", "16x16", 64),
}
CHIPS_PER_HOST = 4
LEAST = {"parallel": 0, "slices": 1, "max_restarts": 0, "cpus": 0, "gpus": 0, "array_size": 0}


@dataclass(frozen=True)
class Resources:
    """What one run needs. A sweep file gives them as RESOURCES, --resources=key=value changes them.

    parallel        local: runs at a time; slurm: array tasks at a time (0: all)
    tpu             jobset, xpk: slice, one of TPUS
    slices          jobset, xpk: slices per run, gang-scheduled
    spot            jobset, xpk: spot capacity
    image           jobset, xpk: container with the checkout as its working directory and the
                    dependencies installed
    claim           jobset, xpk: persistent volume claim (say, of a bucket) that is mounted at the
                    runs' folder
    queue           jobset: local queue of Kueue; slurm: partition
    priority        jobset, xpk: priority class
    max_restarts    jobset, xpk: how often a run is restarted; preemption does not count on Kueue
    cluster, project, zone      xpk: where
    time, cpus, gpus, memory    slurm: limit in its notation, per task; "" and 0: the partition's
                                default
    array_size      slurm: tasks of one array, at most; 0: the cluster's MaxArraySize
    """

    parallel: int = 1
    tpu: str = "v5litepod-16"
    slices: int = 1
    spot: bool = False
    image: str = ""
    claim: str = "runs"
    queue: str = ""
    priority: str = ""
    max_restarts: int = 10
    cluster: str = ""
    project: str = ""
    zone: str = ""
    time: str = ""
    cpus: int = 0
    gpus: int = 0
    memory: str = ""
    array_size: int = 0

    def __post_init__(self) -> None:
        if self.tpu not in TPUS:
            raise ValueError(f"tpu must be one of {', '.join(TPUS)}; got {self.tpu!r}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    def need(self, backend: str, *names: str) -> None:
        """Raises ValueError if one of the named resources is not given."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            raise ValueError(
                f"--backend={backend} needs {', '.join(missing)}: set them in the"
                " sweep's RESOURCES or as --resources=key=value"
            )


def make_resources(given: Mapping[str, Any], overrides: Sequence[str]) -> Resources:
    """RESOURCES of a sweep with "key=value" overrides. Raises ValueError for a key or a value that
    cannot be."""
    kinds = {field.name: type(field.default) for field in fields(Resources)}
    values = dict(given)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--resources must be key=value; got {override!r}")
        values[key] = text
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(f"unknown resource {key!r}; known resources: {', '.join(kinds)}")
        try:
            values[key] = _convert(value, kinds[key])
        except ValueError as error:
            raise ValueError(
                f"resource {key} must be {kinds[key].__name__}; got {value!r}"
            ) from error
    return Resources(**values)


def _convert(value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    if not isinstance(value, str | kind):
        raise ValueError(value)
    return kind(value)


class Backend(Protocol):
    """An engine. It starts what it is given and says how it stands; that a run is finished, its
    summary says. `submit` and `states` raise NoAnswer and Refused (launch/engine.py), and are then
    called again."""

    def submit(self, runs: Sequence[Run]) -> None:
        """Queues or starts runs and returns. A run that was submitted before and has ended may come
        again; one that is under way is left alone: so the same runs can be given again after an
        error, of which a part may have been submitted."""
        ...

    def states(self) -> dict[str, str]:
        """{run name: QUEUED, RUNNING or ENDED} of all submitted runs; ENDED, where the engine says
        so, says nothing of success."""
        ...

    def cancel(self) -> None:
        """Ends what was submitted, as gently as the engine can: a run that is told saves a
        checkpoint."""
        ...

    def render(self, runs: Sequence[Run]) -> str:
        """What `submit` would hand to the engine."""
        ...
