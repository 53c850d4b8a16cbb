"""Runs as JobSets on Kubernetes, queued by Kueue: one manifest per run, gang-scheduled slices of a
TPU.

Kueue starts a JobSet when all its slices fit, and preempts it as a whole; JobSet restarts all of it
when a pod fails. Both end pods with SIGTERM, on which a run saves; the restarted one goes on from
its last checkpoint. The workdirs lie on the claimed volume, so that whoever mounts it (this
process, to collect) sees the summaries."""

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from launch.backend import CHIPS_PER_HOST, ENDED, QUEUED, RUNNING, TPUS, Resources
from launch.runs import Run

SWEEP = "scanax.dev/sweep"
SECONDS_TO_SAVE = 120
# A claim may be of a bucket: gcsfuse serves only pods that say so, and the others do not mind.
BUCKETS = {"gke-gcsfuse/volumes": "true"}


class JobSet:
    """The backend `jobset`: a JobSet per run, which Kueue queues."""

    def __init__(self, name: str, resources: Resources):
        resources.need("jobset", "image", "queue", "claim")
        self.name, self.resources = kubernetes_name(name, 40), resources
        self._runs: dict[str, str] = {}  # JobSet name -> run name

    def submit(self, runs: Sequence[Run]) -> None:
        names = [kubernetes_name(run.name) for run in runs]
        # A JobSet that has failed keeps its name until it is deleted.
        _kubectl("delete", "jobset", "--ignore-not-found", "--wait", *names)
        _kubectl("apply", "--filename=-", text=self.render(runs))
        self._runs |= {name: run.name for name, run in zip(names, runs, strict=True)}

    def states(self) -> dict[str, str]:
        listed = _kubectl("get", "jobsets", "--output=json")
        states = dict.fromkeys(self._runs.values(), ENDED)
        for item in json.loads(listed)["items"]:
            if (name := item["metadata"]["name"]) in self._runs:
                states[self._runs[name]] = _state(item)
        return states

    def cancel(self) -> None:
        _kubectl("delete", "jobsets", f"--selector={SWEEP}={self.name}")

    def render(self, runs: Sequence[Run]) -> str:
        manifests = [manifest(self.name, run, self.resources) for run in runs]
        return yaml.safe_dump_all(manifests, sort_keys=False)


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
        "metadata": {"name": kubernetes_name(run.name), "labels": labels, "annotations": exclusive},
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


def kubernetes_name(text: str, longest: int = 39) -> str:
    """A DNS label of at most 39 characters (what xpk takes): the end of `text`, where names of runs
    have a hash."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    label = label[-longest:].strip("-")
    return label if label[0].isalpha() else f"r-{label}"[:longest].strip("-")


def _mount(run: Run) -> str:
    """Where runs lie: the folder above <sweep>/<scale>/<run>."""
    return str(run.workdir.absolute().parents[2])


def _state(item: dict[str, Any]) -> str:
    status = item.get("status", {})
    true = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
    if true & {"Completed", "Failed"}:
        return ENDED
    active = any(job.get("active", 0) for job in status.get("replicatedJobsStatus", ()))
    return QUEUED if "Suspended" in true or not active else RUNNING


def _kubectl(*arguments: str, text: str | None = None) -> str:
    """Raises ValueError with what kubectl says if it fails."""
    try:
        done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("kubectl is not installed, or not on the path") from error
    if done.returncode:
        raise ValueError(f"kubectl {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
