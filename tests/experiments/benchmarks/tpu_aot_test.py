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

import ops
from experiments.benchmarks import tpu_aot
from experiments.benchmarks.ahead_of_time import tpu_programs
from experiments.compiled.hardware import parse_topology
from experiments.compiled.kernels import kernel_calls
from experiments.compiled.topology import tpu_devices
from ops.framework.examples import abstract_inputs
from ops.window_attention import examples
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
    "gla_forward_vector_bfloat16_bfloat16_4h_128x128_reverse_v6e",
    "gla_backward_none_float32_16h_153x129_v5e",
    "delta_forward_vector_bfloat16_bfloat16_4h_128x128_v6e",
    "delta_backward_scalar_bfloat16_4h_128x128_v6e",
    "diagonal_scan_forward_complex_per_token_float32_1024_v6e",
    "diagonal_scan_backward_complex_per_token_float32_1024_v5e",
    "selective_scan_forward_bfloat16_2048x16_gated_training_v6e",
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
    ("topology", "shape"),
    [
        pytest.param("v5e:1x1", "based_1_3b", marks=pytest.mark.slow),
        pytest.param("v6e:1x1", "long_window", marks=pytest.mark.full),
    ],
)
def test_window_attention_compiles_for_tpu_with_jax_own_kernel(topology, shape):
    sizes = {**examples.SHAPES[shape], "batch": 1, "length": 2048}
    sharding = SingleDeviceSharding(tpu_devices(parse_topology(topology))[0])
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_inputs(examples.inputs, sizes, "", "bfloat16"),
    )

    def loss(inputs):
        o, _ = ops.window_attention(**inputs, window=sizes["window"])
        return o.astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss)).lower(inputs).compile()
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
    "selective_scan": (selective_scan_test.TestSelectiveScan, "gated"),
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


def test_representative_programs_exist_once():
    names = [program.name for program in tpu_programs()]
    assert len(names) == len(set(names)) and set(names) >= REPRESENTATIVE


def test_bytes_of_a_forward_pass_are_inputs_and_outputs_once():
    program = next(x for x in tpu_programs() if x.name.startswith("gla_forward_none"))
    function, shapes = program.function_and_shapes(256)
    (call,) = kernel_calls(jax.make_jaxpr(function)(*shapes))
    assert tpu_aot.moved_bytes(call) == tpu_aot.minimum_bytes(program, 256)
