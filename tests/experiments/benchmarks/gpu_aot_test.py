"""The GPU kernels, compiled by the GPU's own compilers: they compile, and do not take more than
they did."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from experiments.benchmarks import gpu_aot
from experiments.benchmarks.ahead_of_time import gpu_programs

needs_compilers = pytest.mark.skipif(gpu_aot.missing() is not None, reason=str(gpu_aot.missing()))
REPRESENTATIVE = {
    "gla_forward_scalar_bfloat16_4x2048_16of16h_128x128_sm_90a",
    "gla_backward_vector_bfloat16_4x2048_16of16h_128x128_sm_80",
}


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, marks=() if program.name in REPRESENTATIVE else pytest.mark.full)
        for program in gpu_programs()
    ],
    ids=lambda program: program.name,
)
def test_a_program_compiles_and_takes_no_more_than_before(program):
    row = gpu_aot.measure(program)
    assert row["kernels"]
    section = gpu_aot.section(gpu_aot.installed_versions())
    assert not gpu_aot.grown(row, section)


def test_representative_programs_exist_once():
    names = [program.name for program in gpu_programs()]
    assert len(names) == len(set(names)) and set(names) >= REPRESENTATIVE


def row(registers, spilled, name="k"):
    kernel = {"kernel": name, "registers": registers, "spilled_bytes": spilled}
    smaller = {"kernel": name, "registers": 8, "spilled_bytes": 0}
    return {"name": "p", "kernels": [kernel, smaller]}


def test_growth_beyond_two_percent_is_found_and_unknown_compilers_are_not_judged(
    tmp_path, monkeypatch
):
    ratchet = tmp_path / "ratchet.json"
    ratchet.write_text('{"a compiler": {"p": {"k": [100, 0]}}}')
    monkeypatch.setattr(gpu_aot, "RATCHET", ratchet)
    assert not gpu_aot.grown(row(102, 0), "a compiler")
    assert gpu_aot.grown(row(103, 4), "a compiler") == [
        "registers of k in p: 103, recorded 100",
        "spilled bytes of k in p: 4, recorded 0",
    ]
    assert not gpu_aot.grown(row(200, 99), "another")
    # A kernel that the ratchet does not know is not let through, nor one that is missed.
    assert gpu_aot.grown(row(8, 0, name="new"), "a compiler") == [
        "k of p is no longer there",
        "new of p is not recorded",
    ]


def double(name):
    def kernel(x, o):
        o[...] = 2 * x[...]

    def run(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=like, name=name, interpret=False)(x)

    return run


def test_kernels_are_those_of_the_program_whatever_their_names():
    def program(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: double("in_a_loop")(x), double("first")(x))

    assert gpu_aot.kernel_names(program, jnp.ones(16)) == ["first", "in_a_loop"]
    with pytest.raises(ValueError, match="must have a name"):
        gpu_aot.kernel_names(double(None), jnp.ones(16))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["gla", "delta", "selective_scan", "diagonal_scan"])
def test_the_names_of_an_op_are_the_recorded_ones(op, direction):
    """What the report and the ratchet have of a program is what its jaxpr says that it runs."""
    program = next(x for x in gpu_programs() if x.name.startswith(f"{op}_{direction}"))
    recorded = json.loads((gpu_aot.RESULTS / "gpu_aot.json").read_text())["rows"]
    (row,) = (x for x in recorded if x["name"] == program.name)
    names = gpu_aot.kernel_names(program.rule, *program.arguments())
    assert set(names) == {kernel["kernel"] for kernel in row["kernels"]}
