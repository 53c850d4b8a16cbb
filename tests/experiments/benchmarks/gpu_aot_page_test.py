"""The page of what NVIDIA's compiler says."""

import json

from experiments.benchmarks import gpu_aot_page
from experiments.benchmarks.ahead_of_time import gpu_programs
from experiments.training.checkout import RESULTS


def test_the_committed_page_is_that_of_the_committed_rows_in_the_order_of_programs():
    rows = json.loads((RESULTS / "gpu_aot.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [program.name for program in gpu_programs()]
    assert (RESULTS / "gpu_aot.md").read_text() == gpu_aot_page.page(rows) + "\n"
