"""GPU kernels compiled by the GPU's own compilers, with no GPU at hand: do they compile, and what
do they take?

    python -m experiments.benchmarks.ops --gpu_aot                       every program, to experiments/results/gpu_aot.{json,md}
    python -m experiments.benchmarks.ops --gpu_aot --gpu_aot_only=delta  programs with this in their name; other rows stay
    python -m experiments.benchmarks.ops --gpu_aot --gpu_aot_ratchet     and records what they take as not to be exceeded

Needs jax's CUDA plugin and ptxas (`pip install "scanax[aot-gpu]"`, Linux x86-64), no driver and no
CUDA installation. Each program is compiled in a process of its own: XLA writes the PTX of every
kernel to a folder that its flags name, and these are read once per process.

**What the numbers are.** Registers per thread and bytes spilled to memory per thread, from `ptxas
-v`; threads and shared memory per program, from XLA; and how many programs one multiprocessor holds
at once, limited by registers or by shared memory. There is no estimate of time: that needs the GPU
(`python -m experiments.benchmarks.ops --gpu`)."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks.programs.gpu import Program, programs
from experiments.compiled.hardware import (
    GPUS,
    PROGRAMS_PER_MULTIPROCESSOR,
    REGISTERS_PER_MULTIPROCESSOR,
    THREADS_PER_MULTIPROCESSOR,
    Gpu,
    gpu_memory_bytes_per_s,
)
from experiments.training.checkout import CHECKOUT, RESULTS

RATCHET = RESULTS / "gpu_aot_ratchet.json"
GROWTH = 1.02


def target_config(gpu: Gpu) -> str:
    """A stream_executor.GpuTargetConfigProto, which stands for the device that is not there."""
    major, minor = gpu.capability
    feature = "feature_extension: ACCELERATED_FEATURES" if gpu.accelerated else ""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: {THREADS_PER_MULTIPROCESSOR}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.shared_bytes_of_one_program}
          shared_memory_per_core: {gpu.shared_bytes}
          core_count: {gpu.multiprocessors} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {gpu_memory_bytes_per_s(gpu.device_kind):.0f}
          l2_cache_size: {gpu.cache_bytes} clock_rate_ghz: 1.5
          device_memory_size: {gpu.memory_bytes}
          registers_per_core_limit: {REGISTERS_PER_MULTIPROCESSOR}
          registers_per_block_limit: {REGISTERS_PER_MULTIPROCESSOR}
          cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{gpu.device_kind}" """


def ptxas() -> str | None:
    """The assembler of the package nvidia-cuda-nvcc, else one on the path."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name == "ptxas"]
    return found[0] if found else shutil.which("ptxas")


def missing() -> str | None:
    """What is not installed, in words; None where programs can be compiled."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return 'jax-cuda13-plugin is not installed: pip install "scanax[aot-gpu]"'
    if ptxas() is None:
        return 'ptxas is not installed: pip install "scanax[aot-gpu]"'
    return None


def work(program: Program) -> dict[str, float]:
    """Compiles in this process; returns the seconds it took and the bytes beside inputs and
    outputs."""
    topology = topologies.get_topology_desc(
        topology_name="",
        platform="cuda",
        target_config=target_config(GPUS[program.architecture]),
        topology="1x1x1",
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.arguments
        )
        began = time.perf_counter()
        compiled = jax.jit(program.rule).lower(*arguments).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    assert memory is not None
    return {"compile_s": round(seconds, 1), "temporary_bytes": memory.temp_size_in_bytes}


def measure(program: Program, timeout_s: float = 900) -> dict[str, Any]:
    """The row of `program`. Raises RuntimeError with the compiler's last lines if it does not
    compile."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
            # What names addresses for a stack trace that nobody asked for takes most of a
            # compilation.
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.gpu_aot", program.name],
            cwd=CHECKOUT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-30:])
            raise RuntimeError(f"{program.name} did not compile:\n{last[-3000:]}")
        kernels = read_kernels(Path(folder), program.architecture)
    return {
        "name": program.name,
        "architecture": program.architecture,
        **json.loads(done.stdout.splitlines()[-1]),
        "kernels": kernels,
    }


LAUNCH = re.compile(
    r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\]\s+shared_memory:"
    r" (\d+) bytes"
)
FUNCTION = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers",
    re.DOTALL,
)


def read_kernels(folder: Path, architecture: str) -> list[dict[str, Any]]:
    """What each Pallas kernel of a dump takes, in the order of their launches."""
    assembled: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.ptx")):
        if not file.read_text().strip("\0 \n"):
            continue  # a module of constants alone has no code
        output = assemble(file, architecture)
        for name, stored, loaded, registers in FUNCTION.findall(output):
            assembled[name] = int(registers), int(stored) + int(loaded)
    rows = []
    for file in sorted(folder.glob("*thunk_sequence.txt")):
        for name, *sizes in LAUNCH.findall(file.read_text()):
            if name not in assembled or not is_ours(name):
                continue
            x, y, z, threads, shared = map(int, sizes)
            registers, spilled = assembled[name]
            rows.append(
                {
                    "kernel": re.sub(r"__\d+$", "", name),
                    "programs": x * y * z,
                    "threads": threads,
                    "registers": registers,
                    "spilled_bytes": spilled,
                    "shared_bytes": shared,
                    "resident": resident(architecture, registers, threads, shared),
                }
            )
    return rows


def is_ours(name: str) -> bool:
    """Whether a kernel is one of ops/, by its name; XLA calls its own after what they fuse."""
    return name.startswith(("gla_", "decay_", "delta_", "selective_", "diagonal_"))


def assemble(file: Path, architecture: str) -> str:
    """What `ptxas -v` says of a file of PTX. Raises RuntimeError with its words if it does not
    assemble."""
    command = [str(ptxas()), "-v", "--gpu-name", architecture, str(file)]
    command += ["-o", str(file.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas on {file.name}: {done.stderr[-2000:]}")
    return done.stderr


def resident(architecture: str, registers: int, threads: int, shared: int) -> int:
    """Programs that one multiprocessor holds at once."""
    per_warp = -(-registers * 32 // 256) * 256  # allocated in pieces
    by_registers = REGISTERS_PER_MULTIPROCESSOR // (per_warp * threads // 32)
    by_memory = GPUS[architecture].shared_bytes // (shared + 1024)
    by_threads = THREADS_PER_MULTIPROCESSOR // threads
    return min(by_registers, by_memory, by_threads, PROGRAMS_PER_MULTIPROCESSOR)


def installed_versions() -> dict[str, str]:
    tool = ptxas()
    assert tool is not None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True)
    release = re.search(r"V(\d[\d.]*)", done.stdout)
    packages = ("jax", "jaxlib", "jax-cuda13-plugin")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"ptxas": release[1] if release else "unknown"}


def section(versions: dict[str, str]) -> str:
    """What a section of the ratchet is for: another compiler takes other numbers."""
    return f"jaxlib {versions['jaxlib']}, ptxas {versions['ptxas']}"


def taken(row: dict[str, Any]) -> dict[str, list[int]]:
    """Registers and spilled bytes of each kernel of a row; of calls of one kernel, the most."""
    most: dict[str, list[int]] = {}
    for kernel in row["kernels"]:
        now = [kernel["registers"], kernel["spilled_bytes"]]
        before = most.get(kernel["kernel"], [0, 0])
        most[kernel["kernel"]] = [max(pair) for pair in zip(now, before, strict=True)]
    return most


def grown(row: dict[str, Any], section: str) -> list[str]:
    """What of a row exceeds the ratchet by more than 2%, in words; nothing for an unknown compiler
    or program."""
    ratchet = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
    recorded = ratchet.get(section, {}).get(row["name"], {})
    return [
        f"{what} of {kernel} in {row['name']}: {now}, recorded {before}"
        for kernel, values in taken(row).items()
        for what, now, before in zip(
            ("registers", "spilled bytes"), values, recorded.get(kernel, values), strict=True
        )
        if now > GROWTH * before
    ]


def report(record_ratchet: bool, only: str = "") -> None:
    """Compiles all programs whose name contains `only`; prints and records their rows.

    Recorded rows of other programs stay, with the versions that made them. Raises ValueError where
    the compilers are not installed."""
    if missing():
        raise ValueError(f"--gpu_aot: {missing()}")
    versions = installed_versions()
    for program in programs():
        if only not in program.name:
            continue
        row = measure(program) | {"versions": versions}
        print(json.dumps(row), flush=True)
        record(row)
        if record_ratchet:
            ratchet = json.loads(RATCHET.read_text()) if RATCHET.exists() else {}
            ratchet.setdefault(section(versions), {})[row["name"]] = taken(row)
            RATCHET.write_text(json.dumps(ratchet, indent=1, sort_keys=True) + "\n")


def record(row: dict[str, Any]) -> None:
    """Puts a row in the place of the one recorded under its name; rows of programs that are no more
    go."""
    path = RESULTS / "gpu_aot.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {row["name"]: row for row in [*rows, row]}
    rows = [by_name[x.name] for x in programs() if x.name in by_name]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (RESULTS / "gpu_aot.md").write_text(table(rows) + "\n")


HEADING = """\
# GPU kernels, compiled ahead of time

{versions}. Compiled for, not run on, a GPU. Made by `python -m experiments.benchmarks.ops --gpu_aot`.
Registers and spilled bytes (stores and loads) are per thread. Resident: programs that one multiprocessor holds at once.
Temporary: memory beside inputs and outputs, such as states at the boundaries of chunks.

| program | kernel | programs | threads | registers | spilled | shared KB | resident | temporary MB | compile s |
|---|---|---|---|---|---|---|---|---|---|
"""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    lines = []
    for row in rows:
        of_program = [row["name"], f"{row['temporary_bytes'] / 1e6:.0f}", row["compile_s"]]
        for kernel in row["kernels"]:
            name, *rest = of_program
            cells = [
                name,
                *(kernel[x] for x in ("kernel", "programs", "threads", "registers")),
                kernel["spilled_bytes"],
                f"{kernel['shared_bytes'] / 1024:.0f}",
                kernel["resident"],
                *rest,
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            of_program = ["", "", ""]
    versions = {
        "jax {jax}, jaxlib {jaxlib}, ptxas {ptxas}".format(**row["versions"]) for row in rows
    }
    return HEADING.format(versions="; ".join(sorted(versions))) + "\n".join(lines)


if __name__ == "__main__":
    (chosen,) = (program for program in programs() if program.name == sys.argv[1])
    print(json.dumps(work(chosen)))
