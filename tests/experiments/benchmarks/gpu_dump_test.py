"""What kernels take is read from what the compilers leave."""

import pytest

from experiments.benchmarks import gpu_dump

WORDS = (
    "ptxas info : Compiling entry function '{}' for 'sm_90a'\n"
    "ptxas info : Function properties for {}\n"
    "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
    "ptxas info : Used 168 registers, used 1 barriers\n"
    "ptxas info : Compiling entry function 'loop_fusion' for 'sm_90a'\n"
    "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info : Used 16 registers\n"
)


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """What XLA leaves of a program with the kernel `novel`, run twice, and one of XLA's own."""
    (tmp_path / "module_0001.jit_f.1.ptx").write_text(".version 8.7")
    (tmp_path / "module_0001.jit_f.2.ptx").write_text("")  # of constants alone
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(
        "001: kCustomKernel novel__1 grid: [4, 64, 1] threads: [128, 1, 1] "
        " shared_memory: 98304 bytes\n"
        "002: kCustomKernel loop_fusion grid: [1, 1, 1] threads: [128, 1, 1]  shared_memory: 0"
        " bytes\n"
    )
    words = WORDS.format("novel__1", "novel__1")
    monkeypatch.setattr(gpu_dump, "assemble", lambda file, architecture: words)
    return tmp_path


def test_a_dump_is_read_with_the_words_of_both_compilers(dump):
    assert gpu_dump.kernels(dump, "sm_90a", ["novel", "novel"]) == [
        {
            "kernel": "novel",
            "programs": 256,
            "threads": 128,
            "registers": 168,
            "spilled_bytes": 28,
            "shared_bytes": 98304,
            "resident": 2,
        }
    ]


def test_a_kernel_that_a_program_runs_and_a_dump_lacks_is_an_error(dump, monkeypatch):
    with pytest.raises(RuntimeError, match="of lost; launched are novel__1, loop_fusion"):
        gpu_dump.kernels(dump, "sm_90a", ["novel", "lost"])
    # Launched, but what the assembler says of it could not be read.
    monkeypatch.setattr(gpu_dump, "assemble", lambda file, architecture: "other words")
    with pytest.raises(RuntimeError, match="of novel__1; launched are novel__1"):
        gpu_dump.kernels(dump, "sm_90a", ["novel"])


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
    assert gpu_dump.resident("sm_90a", registers, threads, shared) == expected
