"""The GPU kernels, compiled by the GPU's own compilers: they compile, and do not take more than
they did."""

import pytest

from experiments.benchmarks import gpu_aot
from experiments.benchmarks.programs.gpu import programs

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
        for program in programs()
    ],
    ids=lambda program: program.name,
)
def test_a_program_compiles_and_takes_no_more_than_before(program):
    row = gpu_aot.measure(program)
    assert row["kernels"]
    section = gpu_aot.section(gpu_aot.installed_versions())
    assert not gpu_aot.grown(row, section)


def test_representative_programs_exist_once():
    names = [program.name for program in programs()]
    assert len(names) == len(set(names)) and set(names) >= REPRESENTATIVE


def row(registers, spilled):
    kernel = {"kernel": "k", "registers": registers, "spilled_bytes": spilled}
    smaller = {"kernel": "k", "registers": 8, "spilled_bytes": 0}
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


def test_a_dump_is_read_with_the_words_of_both_compilers(tmp_path, monkeypatch):
    (tmp_path / "module_0001.jit_f.1.ptx").write_text(".version 8.7")
    (tmp_path / "module_0001.jit_f.2.ptx").write_text("")  # of constants alone
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(
        "001: kCustomKernel gla_forward__1 grid: [4, 64, 1] threads: [128, 1, 1] "
        " shared_memory: 98304 bytes\n"
        "002: kKernel loop_fusion grid: [1, 1, 1] threads: [128, 1, 1]  shared_memory: 0"
        " bytes\n"
    )
    words = (
        "ptxas info : Compiling entry function 'gla_forward__1' for 'sm_90a'\n"
        "ptxas info : Function properties for gla_forward__1\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info : Used 168 registers, used 1 barriers\n"
        "ptxas info : Compiling entry function 'loop_fusion' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info : Used 16 registers\n"
    )
    monkeypatch.setattr(gpu_aot, "assemble", lambda file, architecture: words)
    assert gpu_aot.read_kernels(tmp_path, "sm_90a") == [
        {
            "kernel": "gla_forward",
            "programs": 256,
            "threads": 128,
            "registers": 168,
            "spilled_bytes": 28,
            "shared_bytes": 98304,
            "resident": 2,
        }
    ]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (255, 128, 0, 2),  # registers
        (255, 256, 0, 1),
        (32, 128, 100_000, 2),  # shared memory: 228 KB
        (16, 64, 0, 32),  # threads
    ],
)
def test_residency_is_what_the_scarcest_resource_allows(registers, threads, shared, expected):
    assert gpu_aot.resident("sm_90a", registers, threads, shared) == expected
