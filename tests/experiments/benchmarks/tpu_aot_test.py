"""The TPU kernels, compiled by the TPU's own compiler: they compile, and their estimated cycles do
not grow."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.benchmarks import tpu_aot, tpu_aot_page, tpu_bundles
from experiments.benchmarks.peers import tpu as tpu_peers
from experiments.benchmarks.program import tpu_programs
from experiments.compiled.hardware import parse_topology
from experiments.compiled.kernels import kernel_calls
from experiments.compiled.topology import tpu_devices
from ops import window_attention
from tests.ops import (
    delta_rule_test,
    diagonal_scan_test,
    gated_linear_attention_test,
    selective_scan_test,
    short_convolution_test,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "scanax[aot]"',
)
# Of every op forward and backward; v6e and v5e, on which the compiler takes different ways.
REPRESENTATIVE = {
    "gla_forward_vector_bfloat16_bfloat16_4h_128x128_v6e",
    "gla_forward_none_bfloat16_4h_128x128_v5e",
    "gla_backward_vector_bfloat16_bfloat16_4h_128x128_v6e",
    "gla_backward_scalar_bfloat16_4h_128x128_v5e",
    "delta_forward_vector_bfloat16_bfloat16_4h_128x128_v6e",
    "delta_forward_scalar_bfloat16_4h_128x128_v5e",
    "delta_backward_scalar_bfloat16_4h_128x128_v6e",
    "delta_backward_vector_bfloat16_bfloat16_4h_128x128_v5e",
    "diagonal_scan_forward_complex_per_token_float32_1024_v6e",
    "diagonal_scan_backward_complex_per_token_float32_1024_v5e",
    "selective_scan_forward_bfloat16_2048x16_gated_training_v6e",
    "selective_scan_backward_bfloat16_2048x16_v5e",
    "selective_scan_backward_bfloat16_2048x16_gated_v5e",
    "short_convolution_forward_bfloat16_2048x4_v6e",
    "short_convolution_backward_bfloat16_2048x4_v4",
}


def cases():
    assert {program.name for program in tpu_programs()} >= REPRESENTATIVE
    for program in tpu_programs():
        mark = pytest.mark.slow if program.name in REPRESENTATIVE else pytest.mark.full
        yield pytest.param(program, id=program.name, marks=mark)


@needs_libtpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("program", list(cases()))
def test_kernels_compile_for_tpu_and_do_not_become_slower(program):
    row = tpu_aot.measure(program)
    assert row["kernels"] == program.kernels
    assert not tpu_aot.grown(row, tpu_aot.installed_versions()["libtpu"])


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "heads", "key_heads", "size", "window"),
    [
        pytest.param("v5e:1x1", 16, 16, 112, 128, marks=pytest.mark.slow),
        pytest.param("v6e:1x1", 32, 8, 64, 2048, marks=pytest.mark.full),
    ],
)
def test_window_attention_compiles_for_tpu_with_jax_own_kernel(
    topology, heads, key_heads, size, window
):
    sharding = SingleDeviceSharding(tpu_devices(parse_topology(topology))[0])

    def like(heads):
        shape = (1, 2048, heads, size)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def loss(q, k, v):
        o, _ = window_attention(q, k, v, window=window)
        return o.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = gradients.lower(like(heads), like(key_heads), like(key_heads)).compile()
    # Forward for the sums of the softmax, then the gradients of queries, and of keys and values.
    assert (program.as_text() or "").count("tpu_custom_call") == 3


# The kernels under what a training step does to them: replicas, rematerialisation, and a mesh that
# cuts batch and heads or time. `tests/contracts/ops.py` and `tests/eight_devices` have the values,
# interpreted.
TRANSFORMATIONS = {
    "vmap": (jax.vmap, (1, 1, 1, 1)),
    "remat": (lambda gradient: gradient, (1, 1, 1, 1)),
    "batch and heads": (lambda gradient: gradient, (2, 1, 1, 2)),
    "time": (lambda gradient: gradient, (1, 1, 4, 1)),
}
CONTRACTS = {
    "gated_linear_attention": (gated_linear_attention_test.TestGatedLinearAttention, "vector"),
    "delta_rule": (delta_rule_test.TestDeltaRule, "scalar"),
    "selective_scan": (selective_scan_test.TestSelectiveScan, "positive"),
    "diagonal_scan": (diagonal_scan_test.TestDiagonalScan, "complex, per token"),
    "short_convolution": (short_convolution_test.TestShortConvolution, "4 taps"),
}


@needs_libtpu
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=pytest.mark.slow if op == "selective_scan" else pytest.mark.full)
        for op in CONTRACTS
    ],
)
def test_transformed_kernels_compile_for_tpu(op, transformation):
    contract, variant = CONTRACTS[op][0](), CONTRACTS[op][1]
    transform, shape = TRANSFORMATIONS[transformation]
    case = contract.data(variant, 128)

    def loss(inputs, state, ids):
        o, final = contract.call(inputs, state, ids, "pallas_tpu")
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(final))

    plain = jax.grad(loss, (0, 1))
    kernels = len(list(kernel_calls(jax.make_jaxpr(plain)(*case))))
    if transformation == "remat":
        plain = jax.grad(jax.checkpoint(loss), (0, 1))
    if transformation == "vmap":
        case = jax.tree.map(lambda x: jnp.stack([x, x]), case)
    devices = np.array(tpu_devices(parse_topology("v5e:2x2"))[: math.prod(shape)])
    mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "sequence", "tensor"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    likes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), case
    )
    with jax.set_mesh(mesh):
        program = jax.jit(transform(plain)).lower(*likes).compile().as_text() or ""
    # Replicas share a kernel's grid; for the states at their starts, devices along time may run
    # kernels more.
    count = program.count("tpu_custom_call")
    assert count >= kernels if transformation == "time" else count == kernels


def test_growth_beyond_two_percent_is_found_and_unknown_versions_are_not_judged(
    tmp_path, monkeypatch
):
    ratchet = tmp_path / "ratchet.json"
    recorded = {"cycles": 100.0, "vmem_bytes": 1000, "spills": 0}
    ratchet.write_text(json.dumps({"1.0": {"p": recorded}}))
    monkeypatch.setattr(tpu_aot, "RATCHET", ratchet)
    assert not tpu_aot.grown({"name": "p", "cycles": 101.9, "vmem_bytes": 900}, "1.0")
    assert tpu_aot.grown({"name": "p", "cycles": 103.0, "vmem_bytes": 900}, "1.0") == [
        "cycles of p: 103.0, recorded 100.0"
    ]
    # A row without cycles, as of a generation that is not analysed, is judged by the rest.
    assert tpu_aot.grown({"name": "p", "vmem_bytes": 900, "spills": 3}, "1.0") == [
        "spills of p: 3, recorded 0"
    ]
    assert not tpu_aot.grown({"name": "p", "cycles": 500.0, "vmem_bytes": 900}, "2.0")
    assert not tpu_aot.grown({"name": "q", "cycles": 500.0, "vmem_bytes": 900}, "1.0")


DUMP = """== CAPACITY:
MXU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    2     3     3     2     2
== UTILIZATION:
1 3 2 0 0
2 0 0 1 1
"""


def test_spills_and_occupancy_are_those_of_the_last_dump_of_each_kernel(tmp_path):
    for name, text in {
        "10-f.1-01-final_hlo-static-per-bundle-utilization.txt": DUMP + "0 3 3 0 0\n",
        "11-f.1-00-pre-delay_hlo-static-per-bundle-utilization.txt": DUMP,
        "12-f.1-01-final_hlo-static-per-bundle-utilization.txt": DUMP,
        "13-g.2-01-final_hlo-static-per-bundle-utilization.txt": DUMP + "1 1 0 1 1\n",
        "14-fusion-01-final_hlo-static-per-bundle-utilization.txt": DUMP,
    }.items():
        (tmp_path / name).write_text(text)
    hlo = """
      %f.1 = (f32[8]) custom-call(%x), custom_call_target="tpu_custom_call"
      %fusion = f32[8] fusion(%f.1)
      g.2 = f32[8] custom-call(%fusion), custom_call_target="tpu_custom_call"
    """
    kernels = tpu_bundles.kernel_names(hlo)
    assert kernels == ["f.1", "g.2"]
    assert tpu_bundles.use(str(tmp_path), kernels) == {
        "bundles": 5,
        "full": 0.8,
        "spills": 7,
        "occupancy": {"MXU": 0.7, "VLOAD": 0.467, "VSTORE": 0.3},
    }


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
    rows = json.loads((tpu_aot.RESULTS / "tpu_aot.json").read_text())["rows"]
    assert (tpu_aot.RESULTS / "tpu_aot.md").read_text() == tpu_aot_page.page(rows) + "\n"


def test_representative_programs_exist_once():
    names = [program.name for program in tpu_programs()]
    assert len(names) == len(set(names)) and set(names) >= REPRESENTATIVE


def test_bytes_of_a_forward_pass_are_inputs_and_outputs_once():
    program = next(x for x in tpu_programs() if x.name.startswith("gla_forward_none"))
    function, shapes = program.function_and_shapes(256)
    (call,) = kernel_calls(jax.make_jaxpr(function)(*shapes))
    assert tpu_aot.moved_bytes(call) == tpu_aot.minimum_bytes(program, 256)
