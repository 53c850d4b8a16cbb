"""The GPU benchmark, as far as it goes without a GPU: its checks find errors, its page shows gaps
as gaps."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu as gpu_bench
from ops.selective_scan.pallas_gpu import walks

TINY = (1, 24, 1, 16)


def tiny_case():
    case = next(x for x in gpu_bench.cases() if x.variant == "scalar")
    return dataclasses.replace(case, size=TINY, small=TINY, peers={})


def test_the_benchmark_needs_a_gpu():
    with pytest.raises(ValueError, match="--gpu needs an NVIDIA GPU"):
        gpu_bench.run(1, "")


def test_every_size_is_measured_for_every_op_and_the_first_of_all_come_first():
    cases = gpu_bench.cases()
    names = {case.name for case in cases}
    assert len(names) == 13 and len({(c.name, c.size) for c in cases}) == len(cases)
    assert {case.name for case in cases[: len(names)]} == names
    gla = [case.size for case in cases if case.name == "gated_linear_attention vector"]
    assert {(1, 8192, 96, 128), (8, 2048, 32, 256), (1, 262144, 8, 128)} <= set(gla)


@pytest.mark.parametrize("case", list(gpu_bench.xla_cases()), ids=lambda case: case.op)
def test_ops_without_a_kernel_of_ours_are_checked_and_timed_too(case):
    small = {"short_convolution": (1, 24, 8, 4), "long_convolution": (1, 24, 8)}
    size = small.get(case.op, TINY)
    case = dataclasses.replace(case, size=size, small=size)
    assert gpu_bench.check(case, "float32")["passed"]
    (row,) = gpu_bench.time_case(case, "forward", "NVIDIA H200")
    assert row["median_ms"] > 0 and row["memory_floor_ms"] > 0


@pytest.mark.slow
def test_a_check_passes_for_the_kernels_and_fails_for_a_wrong_one():
    case = tiny_case()
    result = gpu_bench.check(case, "float32")
    assert result["passed"] and set(result["errors"]) == {
        "output",
        *(f"gradient of {name}" for name in ("q", "k", "v", "decay_log")),
    }

    def wrong(segments, implementation, q, k, v, decay_log):
        factor = 1 + 1e-3 * (implementation == "pallas_gpu")
        return case.call(segments, implementation, q, k, v, factor * decay_log)

    assert not gpu_bench.check(dataclasses.replace(case, call=wrong), "float32")["passed"]


@pytest.mark.parametrize("op", ["selective_scan", "diagonal_scan"])
def test_peers_in_plain_jax_compute_what_ours_do(op):
    case = next(x for x in gpu_bench.cases() if x.op == op)
    inputs = case.inputs((2, 24, *case.small[2:]), "float32")
    o = case.peers["jax.lax.associative_scan"](inputs, "forward")()
    wanted = case.call(False, "reference", *inputs.values())
    assert gpu_bench.relative_l2(o, wanted) < 1e-5


def test_a_gate_outside_the_op_computes_what_the_one_inside_does(monkeypatch):
    monkeypatch.setattr(walks, "TURN", 2)
    case = next(x for x in gpu_bench.cases() if x.name == "selective_scan gated")
    inputs = case.inputs((2, 24, *case.small[2:]), "float32")
    outside = case.peers["ours, gated by XLA"](inputs, "forward")()
    inside = case.call(False, "reference", *inputs.values())
    assert gpu_bench.relative_l2(outside, inside) < 1e-5


def test_a_peer_that_is_absent_is_a_gap_and_ours_is_timed():
    def absent(inputs, mode):
        raise ImportError("no such package")

    def call(segments, implementation, q, k, v, decay_log):
        return (q * jnp.exp(decay_log)[..., None]).astype(q.dtype)

    case = dataclasses.replace(tiny_case(), call=call, peers={"another": absent})
    rows = gpu_bench.time_case(case, "forward+backward", "NVIDIA H200")
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["pallas_gpu"]["median_ms"] > 0
    assert by_name["another"]["gap"] == "ImportError: no such package"
    assert "median_ms" not in by_name["another"]
    # q, k, v and the output 24 * 16 values of two bytes, decays 24 of four.
    moved = 3 * (3 * 24 * 16 * 2 + 24 * 4) + 2 * 24 * 16 * 2
    assert by_name["xla"]["memory_floor_ms"] == pytest.approx(1e3 * moved / 4.8e12)


def test_the_page_shows_what_was_measured_and_says_what_was_not():
    case = next(x for x in gpu_bench.cases() if x.variant == "scalar")
    row = {
        "op": case.op,
        "variant": case.variant,
        "size": list(case.size),
        "mode": "forward",
        "memory_floor_ms": 0.5,
        "matmul_floor_ms": None,
    }
    rows = [
        row | {"implementation": "pallas_gpu", "median_ms": 2.0},
        row | {"implementation": "xla", "median_ms": 9.0},
        row | {"implementation": "another", "gap": "ImportError"},
    ]
    page = gpu_bench.page({"environment": {"device": "x"}, "checks": [], "rows": rows})
    lines = [line for line in page.splitlines() if line.startswith(f"| {case.name} |")]
    assert lines[0].endswith("forward | 2.00 | xla 9.00 (4.50x); another ImportError | 0.50, ? |")
    assert all("not measured" in line for line in lines[1:])


def test_the_committed_page_is_that_of_the_committed_rows():
    path = gpu_bench.RESULTS / "bench_gpu.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    assert (gpu_bench.RESULTS / "bench_gpu.md").read_text() == gpu_bench.page(record)
