"""The GPU benchmark, as far as it goes without a GPU: its checks find errors, its page shows gaps
as gaps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu as benchmark
from experiments.benchmarks.cases import Case
from ops.selective_scan.pallas_gpu import walks

TINY = {
    "batch": 1,
    "length": 24,
    "key_heads": 1,
    "heads": 1,
    "key": 16,
    "value": 16,
    "window": 8,
    "width": 8,
    "taps": 4,
    "state": 4,
    "state_size": 4,
    "outputs": 1,
    "modes": 4,
    "systems": 3,
    "channels": 8,
    "landmarks": 4,
    "radius": 2,
}
CASES = benchmark.all_cases()


def tiny(op, variant=""):
    case = next(x for x in CASES if (x.op, x.variant) == (op, variant))
    return dataclasses.replace(case, sizes={name: TINY[name] for name in case.sizes})


def test_the_benchmark_needs_a_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        benchmark.run(1, "")


def test_every_shape_is_measured_of_every_variant_and_the_first_of_all_come_first():
    names = {case.name for case in CASES}
    assert len({(case.name, case.shape) for case in CASES}) == len(CASES)
    assert {case.name for case in CASES[: len(names)]} == names
    gla = [case.shape for case in CASES if case.name == "gated_linear_attention vector"]
    assert {"1x8192_96x128", "8x2048_32x256", "1x262144_8x128"} <= set(gla)


WITHOUT_KERNEL = [x for x in CASES if benchmark.implementations(x.op) == ("xla",)]


@pytest.mark.parametrize("op", sorted({case.op for case in WITHOUT_KERNEL}))
def test_ops_without_a_kernel_of_ours_are_checked_and_timed_too(op):
    case = tiny(op, next(x.variant for x in WITHOUT_KERNEL if x.op == op))
    assert benchmark.check(case, "float32")["passed"]
    (row,) = benchmark.time_case(case, "forward", "NVIDIA H200")
    assert row["median_ms"] > 0 and row["memory_floor_ms"] > 0


@pytest.mark.slow
def test_a_check_passes_for_the_kernels_and_fails_for_a_wrong_one():
    class Wrong(Case):
        def call(self, implementation, segments=False):
            factor = 1 + 1e-3 * (implementation == "pallas_gpu")
            right = super().call(implementation, segments)
            return lambda inputs: right(inputs | {"decay_log": factor * inputs["decay_log"]})

    case = tiny("gated_linear_attention", "scalar")
    result = benchmark.check(case, "float32")
    assert result["passed"] and set(result["errors"]) == {
        "output",
        *(f"gradient of {name}" for name in ("q", "k", "v", "decay_log")),
    }
    wrong = Wrong(case.op, case.variant, case.shape, case.sizes)
    assert not benchmark.check(wrong, "float32")["passed"]


@pytest.mark.parametrize(("op", "variant"), [("selective_scan", ""), ("diagonal_scan", "complex")])
def test_peers_in_plain_jax_compute_what_ours_do(op, variant):
    case = tiny(op, variant)
    inputs = case.inputs("float32")
    o = benchmark.peers.peers(op, variant)["jax.lax.associative_scan"](inputs, "forward")()
    assert benchmark.relative_l2(o, case.call("reference")(inputs)) < 1e-5


def test_a_gate_outside_the_op_computes_what_the_one_inside_does(monkeypatch):
    monkeypatch.setattr(walks, "TURN", 2)
    case = tiny("selective_scan", "gated")
    inputs = case.inputs("float32")
    outside = benchmark.peers.gate_outside(inputs, "forward")()
    assert benchmark.relative_l2(outside, case.call("reference")(inputs)) < 1e-5


def test_a_peer_that_is_absent_is_a_gap_and_ours_is_timed(monkeypatch):
    def absent(inputs, mode):
        raise ImportError("no such package")

    class Quick(Case):
        def call(self, implementation, segments=False):
            def call(inputs):
                o = inputs["q"] * jnp.exp(inputs["decay_log"])[..., None]
                return o.astype(jnp.bfloat16)

            return call

    monkeypatch.setattr(benchmark.peers, "peers", lambda op, variant: {"another": absent})
    case = tiny("gated_linear_attention", "scalar")
    case = Quick(case.op, case.variant, case.shape, case.sizes)
    rows = benchmark.time_case(case, "forward+backward", "NVIDIA H200")
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["pallas_gpu"]["median_ms"] > 0
    assert by_name["another"]["gap"] == "ImportError: no such package"
    assert "median_ms" not in by_name["another"]
    # q, k, v and the output 24 * 16 values of two bytes, decays 24 of four.
    moved = 3 * (3 * 24 * 16 * 2 + 24 * 4) + 2 * 24 * 16 * 2
    assert by_name["xla"]["memory_floor_ms"] == pytest.approx(1e3 * moved / 4.8e12)


def test_errors_are_those_of_all_arrays_of_a_tree_together():
    wanted = (jnp.array([3.0, 0.0]), jnp.array([4.0]))
    got = (jnp.array([3.0, 0.3]), jnp.array([4.4]))
    assert benchmark.relative_l2(got, wanted) == pytest.approx(0.1)
    assert benchmark.relative_l2(jax.tree.leaves(got), wanted) == pytest.approx(0.1)


def test_the_page_shows_what_was_measured_and_says_what_was_not():
    case = next(x for x in CASES if x.variant == "scalar")
    row = {
        "op": case.op,
        "variant": case.variant,
        "shape": case.shape,
        "mode": "forward",
        "memory_floor_ms": 0.5,
        "matmul_floor_ms": None,
    }
    rows = [
        row | {"implementation": "pallas_gpu", "median_ms": 2.0},
        row | {"implementation": "xla", "median_ms": 9.0},
        row | {"implementation": "another", "gap": "ImportError"},
    ]
    page = benchmark.page({"environment": {"device": "x"}, "checks": [], "rows": rows})
    lines = [line for line in page.splitlines() if line.startswith(f"| {case.name} |")]
    assert lines[0].endswith("forward | 2.00 | xla 9.00 (4.50x); another ImportError | 0.50, ? |")
    assert all("not measured" in line for line in lines[1:])


def test_the_committed_page_is_that_of_the_committed_rows():
    path = benchmark.RESULTS / "bench_gpu.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    assert (benchmark.RESULTS / "bench_gpu.md").read_text() == benchmark.page(record)
