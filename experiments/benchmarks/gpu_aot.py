"""GPU kernels compiled by the GPU's own compilers, with no GPU at hand: do they compile, and what
do they take?

    python -m experiments.benchmarks.gpu_aot               # every program, to experiments/results/
    python -m experiments.benchmarks.gpu_aot --only=delta  # those with this in their name
    python -m experiments.benchmarks.gpu_aot --ratchet     # and records what must not be exceeded

Writes gpu_aot.json and gpu_aot.md; rows of other programs stay. Needs jax's CUDA plugin and ptxas
(`pip install "scanax[aot-gpu]"`, Linux x86-64), no driver and no CUDA installation. Each program is
compiled in a process of its own: XLA writes the PTX of every kernel to a folder that its flags
name, and these are read once per process. Which of the kernels there are ours follows from the
program's jaxpr; one that is not found in the dump is an error.

**What the numbers are.** Registers per thread and bytes spilled to memory per thread, from `ptxas
-v`; threads and shared memory per program, from XLA; and how many programs one multiprocessor holds
at once, limited by registers or by shared memory. There is no estimate of time: that needs the GPU
(`python -m experiments.benchmarks.gpu`)."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import gpu_aot_page, gpu_dump, ratchet
from experiments.benchmarks.ahead_of_time import GpuProgram, gpu_programs
from experiments.compiled.hardware import (
    GPUS,
    REGISTERS_PER_MULTIPROCESSOR,
    THREADS_PER_MULTIPROCESSOR,
    Gpu,
    gpu_memory_bytes_per_s,
)
from experiments.compiled.kernels import kernel_calls
from experiments.training import command_line
from experiments.training.checkout import CHECKOUT, RESULTS

RATCHET = RESULTS / "gpu_aot_ratchet.json"


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


def missing() -> str | None:
    """What is not installed, in words; None where programs can be compiled."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return 'jax-cuda13-plugin is not installed: pip install "scanax[aot-gpu]"'
    if gpu_dump.ptxas() is None:
        return 'ptxas is not installed: pip install "scanax[aot-gpu]"'
    return None


def work(program: GpuProgram) -> dict[str, Any]:
    """Seconds of compiling the program in this process, bytes beside inputs and outputs, and names
    of the kernels that the program runs."""
    topology = topologies.get_topology_desc(
        topology_name="",
        platform="cuda",
        target_config=target_config(GPUS[program.architecture]),
        topology="1x1x1",
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = program.arguments()
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        began = time.perf_counter()
        compiled = jax.jit(program.rule).lower(*arguments).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    assert memory is not None
    return {
        "compile_s": round(seconds, 1),
        "temporary_bytes": memory.temp_size_in_bytes,
        "names": kernel_names(program.rule, *shapes),
    }


def kernel_names(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Names of the Pallas kernels that a program runs on a GPU, in order. Raises ValueError for one
    without a name: it could not be told from those that XLA makes."""
    calls = kernel_calls(jax.make_jaxpr(function)(*arguments), "cuda")
    names = [call.params["name"] for call in calls]
    if None in names:
        raise ValueError(f"every kernel must have a name; got {names}")
    return names


def measure(program: GpuProgram, timeout_s: float = 900) -> dict[str, Any]:
    """The row of `program`. Raises RuntimeError with the compiler's last lines if it does not
    compile."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            # Tests may have set it; registers and spills are those of optimised code.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
            # What names addresses for a stack trace that nobody asked for takes most of a
            # compilation.
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.gpu_aot", f"--compile={program.name}"],
            cwd=CHECKOUT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-30:])
            raise RuntimeError(f"{program.name} did not compile:\n{last[-3000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        kernels = gpu_dump.kernels(Path(folder), program.architecture, result.pop("names"))
    of_program = {"name": program.name, "architecture": program.architecture}
    return of_program | result | {"kernels": kernels}


def installed_versions() -> dict[str, str]:
    """Versions of all that compiles, by package."""
    tool = gpu_dump.ptxas()
    assert tool is not None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True)
    release = re.search(r"V(\d[\d.]*)", done.stdout)
    packages = ("jax", "jaxlib", "jax-cuda13-plugin")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"ptxas": release[1] if release else "unknown"}


def section(versions: dict[str, str]) -> str:
    """Name of the ratchet's section for a compiler: another one takes other numbers."""
    return f"jaxlib {versions['jaxlib']}, ptxas {versions['ptxas']}"


def taken(row: dict[str, Any]) -> dict[str, list[int]]:
    """Registers and spilled bytes of each kernel of a row; of calls of one kernel, the most."""
    most: dict[str, list[int]] = {}
    for kernel in row["kernels"]:
        now = [kernel["registers"], kernel["spilled_bytes"]]
        before = most.get(kernel["kernel"], [0, 0])
        most[kernel["kernel"]] = [max(pair) for pair in zip(now, before, strict=True)]
    return most


def grown(row: dict[str, Any], compiler: str) -> list[str]:
    """What of a row exceeds the ratchet, in words, and which kernels only one of the two knows;
    nothing for a compiler of which nothing is recorded."""
    by_program = ratchet.recorded(RATCHET, compiler)
    if by_program is None:
        return []
    recorded, now = by_program.get(row["name"], {}), taken(row)
    found = [
        f"{kernel} of {row['name']} is {'not recorded' if kernel in now else 'no longer there'}"
        for kernel in sorted(set(recorded) ^ set(now))
    ]
    return found + [
        f"{what} of {kernel} in {row['name']}: {value}, recorded {before}"
        for kernel in sorted(set(recorded) & set(now))
        for what, value, before in zip(
            ("registers", "spilled bytes"), now[kernel], recorded[kernel], strict=True
        )
        if value > ratchet.GROWTH * before
    ]


def report(record_ratchet: bool, only: str = "") -> None:
    """Compiles all programs whose name contains `only`; prints and records their rows.

    Recorded rows of other programs stay, with the versions that made them. Raises ValueError where
    the compilers are not installed."""
    if missing():
        raise ValueError(missing())
    versions = installed_versions()
    for program in gpu_programs():
        if only not in program.name:
            continue
        row = measure(program) | {"versions": versions}
        print(json.dumps(row), flush=True)
        record(row)
        if record_ratchet:
            ratchet.record(RATCHET, section(versions), program.name, taken(row))


def record(row: dict[str, Any]) -> None:
    """Puts a row in the place of the one recorded under its name; rows of programs that are no more
    go."""
    path = RESULTS / "gpu_aot.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {row["name"]: row for row in [*rows, row]}
    rows = [by_name[x.name] for x in gpu_programs() if x.name in by_name]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (RESULTS / "gpu_aot.md").write_text(gpu_aot_page.page(rows) + "\n")


def main() -> None:
    options = flags.FLAGS
    if not options.compile:
        report(options.ratchet, options.only)
        return
    (chosen,) = (program for program in gpu_programs() if program.name == options.compile)
    print(json.dumps(work(chosen)))


if __name__ == "__main__":
    flags.DEFINE_string("only", "", "Only programs with this in their name.")
    flags.DEFINE_bool("ratchet", False, "Record what kernels take as not to be exceeded.")
    # What the command starts for each program.
    flags.DEFINE_string("compile", "", "Compile this program in this process, print what it took.")
    command_line.run(main, cache=False)
