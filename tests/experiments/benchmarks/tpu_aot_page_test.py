"""The page of what the TPU compiler says."""

import json

from experiments.benchmarks import tpu_aot_page
from experiments.benchmarks.peers import tpu as tpu_peers
from experiments.training.checkout import RESULTS


def test_the_page_has_a_column_for_a_newer_compiler_and_a_line_for_each_peer():
    def row(name, libtpu, **numbers):
        versions = {"jax": "1", "jaxlib": "1", "libtpu": libtpu}
        compiled = {"vmem_bytes": 2_000_000, "compile_s": 1.0, "spills": 7}
        compiled["full"] = 0.8
        compiled["occupancy"] = {"MXU": 0.5, "VALU": 0.75}
        return {"name": name, "versions": versions} | compiled | numbers

    def analysed(cycles):
        shares = {"bytes": 3.0, "minimum_bytes": 2.0, "bandwidth_bound": 20.0}
        return {"cycles": cycles, "cycles_by_kernel": [cycles], "xla_cycles": 0.0} | shares

    ours, theirs = (tpu_peers.name(side, *tpu_peers.CASES[0]) for side in tpu_peers.SIDES)
    page = tpu_aot_page.page(
        [
            row("p", "0.1", **analysed(10.0)),
            row("q", "0.1"),
            row("p", "0.2", **analysed(11.0)),
            row(ours, "0.2", **analysed(10.0)),
            row(theirs, "0.2", **analysed(50.0)),
        ]
    )
    assert "cycles, libtpu 0.2 |" in page
    busiest = "VALU 75%, any 80%"
    p = f"| p | 10.0 | 10.0 | 0.0 | 20.0 | - | 1.50 | 2.0 | 7 | {busiest} | 1.0 | 11.0 |"
    assert f"{p} {busiest} |" in page and "| q | -" in page
    # Ours is bound by memory there, 20 cycles.
    assert f"| {tpu_peers.PEER} | 50.0 | 0.0 | 20.0 | 2.50 | 7 | {busiest} |" in page


def test_the_committed_page_is_that_of_the_committed_rows():
    rows = json.loads((RESULTS / "tpu_aot.json").read_text())["rows"]
    assert (RESULTS / "tpu_aot.md").read_text() == tpu_aot_page.page(rows) + "\n"
