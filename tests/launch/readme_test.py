"""The walk from quota to table in launch/README.md agrees with itself and with what the sweep
renders."""

import re
from pathlib import Path

import yaml

from experiments.training.checkout import CHECKOUT
from launch.backend import TPUS, make_resources
from launch.jobset import JobSet
from launch.runs import plan
from launch.sweep import BACKENDS, find_sweep

FOLDER = CHECKOUT / "launch"
TEXT = (FOLDER / "README.md").read_text("utf-8")


def documents() -> list[dict]:
    """The Kubernetes objects that the page applies."""
    blocks = re.findall(r"kubectl apply -f - <<'?EOF'?\n(.*?)\nEOF", TEXT, re.DOTALL)
    return [item for block in blocks for item in yaml.safe_load_all(block)]


def given_resources() -> list[str]:
    return re.findall(r"(?:--resources=|WHERE=)(tpu=\S+,\S+)", TEXT)


def test_its_links_and_backends_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (FOLDER / path).exists(), path
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(BACKENDS)


def test_its_resources_are_known_and_its_queue_and_claim_are_made():
    made = {(item["kind"], item["metadata"]["name"]) for item in documents()}
    assert len(given_resources()) == 2
    for text in given_resources():
        need = make_resources({}, text.split(","))
        assert need.tpu == "v5litepod-256"
        assert not need.queue or ("LocalQueue", need.queue) in made
        assert ("PersistentVolumeClaim", need.claim) in made


def test_its_queue_admits_what_the_sweep_submits_and_its_volume_is_where_runs_lie():
    name, table = find_sweep("mqar")
    run = plan(table, name, "paper", Path("/runs"))[0][0]
    need = make_resources({}, given_resources()[1].split(","))
    (manifest,) = yaml.safe_load_all(JobSet("mqar-paper", need).render([run]))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    objects = {item["kind"]: item for item in documents()}
    labels = objects["ResourceFlavor"]["spec"]["nodeLabels"]
    assert labels.items() <= pod["nodeSelector"].items()
    (group,) = objects["ClusterQueue"]["spec"]["resourceGroups"]
    (quota,) = group["flavors"][0]["resources"]
    (container,) = pod["containers"]
    chips = job["parallelism"] * container["resources"]["limits"][quota["name"]]
    assert chips == quota["nominalQuota"] == 4 * TPUS["v5litepod-256"][2] == 256
    assert container["volumeMounts"][0]["mountPath"] == "/runs"


def test_its_batch_divides_over_the_chips():
    _, table = find_sweep("mqar")
    assert {cell.make_config().batch_size % 256 for cell in table.cells("paper")} == {0}
