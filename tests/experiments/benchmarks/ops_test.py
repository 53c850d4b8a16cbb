"""The benchmark on CPU: what it makes of several processes."""

import importlib
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.benchmarks import ops as benchmark
from experiments.benchmarks.peers import cpu as peers


def test_a_peer_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install jax-linear-attention"):
        peers.check_installed()


def test_a_peer_gets_the_inputs_in_its_own_order_and_gives_the_first_output(monkeypatch):
    package = SimpleNamespace(kda=lambda *inputs: (inputs, "state"), delta_rule=None)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    (call,) = peers.functions("delta_rule", "vector").values()
    inputs = {"beta": 5, "decay_log": 4, "v": 3, "k": 2, "q": 1}
    assert call(inputs) == (1, 2, 3, 4, 5)
    assert peers.functions("delta_rule", "constant") == {}


def row(implementation, median_ms, min_ms, over_first):
    return {
        "implementation": implementation,
        "median_ms": median_ms,
        "min_ms": min_ms,
        "over_first": over_first,
        "compile_s": 1.0,
    }


def test_rows_of_several_processes_become_medians_with_the_spread_of_the_ratio():
    runs = [
        [row("ours", 10.0, 9.0, 1.0), row("theirs", 20.0, 15.0, 2.0)],
        [row("ours", 12.0, 8.0, 1.0), row("theirs", 18.0, 16.0, 1.5)],
        [row("ours", 90.0, 7.0, 1.0), row("theirs", 99.0, 17.0, 1.1)],
    ]
    ours, theirs = benchmark.median_rows(runs)
    assert (ours["median_ms"], ours["min_ms"]) == (12.0, 7.0)
    assert (theirs["median_ms"], theirs["min_ms"]) == (20.0, 15.0)
    # The median of ratios within a process, not the ratio of medians.
    assert theirs["over_first"] == 1.5
    assert theirs["over_first_from_to"] == [1.1, 2.0]
    assert theirs["implementation"] == "theirs"


@pytest.mark.slow
def test_every_process_measures_what_the_command_line_names(tmp_path):
    file = tmp_path / "benchmark.json"
    options = ["--ops=short_convolution", "--implementations=xla", "--rounds=1"]
    command = [sys.executable, "-m", "experiments.benchmarks.ops", *options]
    subprocess.run([*command, "--processes=2", f"--json={file}"], check=True)
    record = json.loads(file.read_text())
    assert record["environment"]["processes"] == 2
    assert [(x["op"], x["mode"]) for x in record["rows"]] == [
        ("short_convolution", "forward"),
        ("short_convolution", "forward+backward"),
    ]
    assert all(x["over_first_from_to"] == [1.0, 1.0] for x in record["rows"])
