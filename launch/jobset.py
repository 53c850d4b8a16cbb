"""Runs as JobSets on Kubernetes, queued by Kueue: one manifest per run, gang-scheduled slices of a
TPU.

Kueue starts a JobSet when all its slices fit, and preempts it as a whole; JobSet restarts all of it
when a pod fails. Both end pods with SIGTERM, on which a run saves; the restarted one goes on from
its last checkpoint. The workdirs lie on the claimed volume, so that whoever mounts it (this
process, to collect) sees the summaries."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from launch.backend import CHIPS_PER_HOST, ENDED, QUEUED, RUNNING, TPUS, Resources
from launch.engine import NoAnswer, Refused, ask, insist, tell
from launch.names import sweep_name, workload_name
from launch.runs import Run

SWEEP = "scanax.dev/sweep"
JOBSET = "jobset.sigs.k8s.io/jobset-name"  # label of its pods
SECONDS_TO_SAVE = 120
DELETE_TIMEOUT_S = SECONDS_TO_SAVE + 60.0
AT_ONCE = 50  # JobSets of one request
# A claim may be of a bucket: gcsfuse serves only pods that say so, and the others do not mind.
BUCKETS = {"gke-gcsfuse/volumes": "true"}


class JobSet:
    """The backend `jobset`: a JobSet per run, which Kueue queues."""

    def __init__(self, name: str, resources: Resources):
        resources.need("jobset", "image", "queue", "claim")
        self._begin(name, resources)

    def _begin(self, name: str, resources: Resources) -> None:
        self.name, self.resources = name, resources
        self._runs: dict[str, Run] = {}  # by the name of their JobSet
        self._told: set[str] = set()  # names that are under way, or may be
        self._failed: set[str] = set()  # whose output is at hand

    def submit(self, runs: Sequence[Run]) -> None:
        named = {workload_name(run): run for run in runs}
        found = _jobsets()
        # What is over keeps its name until it is deleted. What lives is this run, of a sweep that
        # was killed or got no answer: it is left alone.
        over = [name for name in named if name in found and _is_over(found[name])]
        live = [name for name in named if name in found and name not in over]
        for name in live:
            if name not in self._told:
                print(f"{named[name].label}: is queued or runs already, as {name}", flush=True)
            self._runs[name] = named[name]
        self._told |= set(live)
        new = [name for name in named if name not in live]
        for start in range(0, len(new), AT_ONCE):
            names = new[start : start + AT_ONCE]
            if old := [name for name in names if name in over]:
                delete = ("delete", "jobsets", "--ignore-not-found", "--wait")
                tell("kubectl", *delete, *old, timeout_s=DELETE_TIMEOUT_S)
            # Whoever stops the sweep before an answer came means these, too.
            self._told |= set(names)
            try:
                self._create([named[name] for name in names])
            except Refused:
                found = _jobsets()
                self._told -= {name for name in names if name not in found}
                self._runs |= {name: named[name] for name in names if name in found}
                raise
            self._runs |= {name: named[name] for name in names}
            self._failed -= set(names)

    def states(self) -> dict[str, str]:
        found = _jobsets() if self._runs else {}
        states = {}
        for name, run in self._runs.items():
            states[run.name] = _state(found[name]) if name in found else ENDED
            if states[run.name] == ENDED:
                self._told.discard(name)
            if name in found and "Failed" in _conditions(found[name]) and name not in self._failed:
                self._failed.add(name)
                _keep_output(name, run)
        return states

    def cancel(self) -> None:
        names = sorted(self._told)
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            insist("kubectl", "delete", "jobsets", "--ignore-not-found", "--wait=false", *some)

    def render(self, runs: Sequence[Run]) -> str:
        manifests = [manifest(sweep_name(self.name, run), run, self.resources) for run in runs]
        return yaml.safe_dump_all(manifests, sort_keys=False)

    def _create(self, runs: Sequence[Run]) -> None:
        tell("kubectl", "apply", "--filename=-", text=self.render(runs))


def manifest(sweep: str, run: Run, need: Resources) -> dict[str, Any]:
    """The JobSet of one run: `slices` identical jobs with a pod per host."""
    accelerator, topology, hosts = TPUS[need.tpu]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if need.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    chips = {"google.com/tpu": CHIPS_PER_HOST}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "nodeSelector": selector,
        "containers": [
            {
                "name": "run",
                "image": need.image,
                "command": ["bash", "-c", shlex.join(run.command)],
                # JobSet's headless service, and libtpu's ports between hosts and slices.
                "ports": [{"containerPort": port} for port in (8471, 8080)],
                "resources": {"requests": dict(chips), "limits": dict(chips)},
                "volumeMounts": [{"name": "runs", "mountPath": _mount(run)}],
            }
        ],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": need.claim}}],
    }
    if need.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
            | {"effect": "NoSchedule"}
        ]
    if need.priority:
        pod["priorityClassName"] = need.priority
    labels = {SWEEP: sweep, "kueue.x-k8s.io/queue-name": need.queue}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": workload_name(run), "labels": labels, "annotations": exclusive},
        "spec": {
            "failurePolicy": {"maxRestarts": need.max_restarts},
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": need.slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "backoffLimit": 0,
                            "completionMode": "Indexed",
                            "template": {"metadata": {"annotations": dict(BUCKETS)}, "spec": pod},
                        }
                    },
                }
            ],
        },
    }


def _mount(run: Run) -> str:
    """Where runs lie: the folder above <sweep>/<scale>/<run>."""
    return str(run.workdir.absolute().parents[2])


def _jobsets() -> dict[str, Any]:
    """All JobSets of the namespace by name, as Kubernetes describes them."""
    printed = ask("kubectl", "get", "jobsets", "--output=json")
    try:
        return {item["metadata"]["name"]: item for item in json.loads(printed)["items"]}
    except (ValueError, KeyError, TypeError) as error:
        raise NoAnswer(f"kubectl get printed no list of JobSets ({error!r})") from error


def _conditions(item: Any) -> set[str]:
    """What is true of a JobSet."""
    conditions = item.get("status", {}).get("conditions", ())
    return {condition["type"] for condition in conditions if condition["status"] == "True"}


def _is_over(item: Any) -> bool:
    """Whether a JobSet has ended, or is being deleted."""
    deleted = "deletionTimestamp" in item["metadata"]
    return deleted or bool(_conditions(item) & {"Completed", "Failed"})


def _state(item: Any) -> str:
    true = _conditions(item)
    if true & {"Completed", "Failed"}:
        return ENDED
    jobs = item.get("status", {}).get("replicatedJobsStatus", ())
    active = any(job.get("active", 0) for job in jobs)
    return QUEUED if "Suspended" in true or not active else RUNNING


def _keep_output(name: str, run: Run) -> None:
    """Puts the last lines of a failed JobSet's pods into the log of the run, as far as they can be
    had; an error that the run named stands last."""
    try:
        lines = ask("kubectl", "logs", f"--selector={JOBSET}={name}", "--tail=20").splitlines()
    except (NoAnswer, Refused) as problem:
        lines = [str(problem)]
    errors = [line for line in lines if line.startswith("error: ")]
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        with run.log.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in (*lines, *errors[-1:]))
    except OSError as error:
        print(f"{run.label}: its output cannot be kept: {error}", flush=True)
