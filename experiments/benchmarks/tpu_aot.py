"""TPU kernels compiled by the TPU's own compiler, with no TPU at hand: do they compile, and what
does it estimate?

    python -m experiments.benchmarks.tpu_aot               # every program, to experiments/results/
    python -m experiments.benchmarks.tpu_aot --only=delta  # those with this in their name
    python -m experiments.benchmarks.tpu_aot --ratchet     # and records cycles, not to be exceeded

Writes tpu_aot.json and tpu_aot.md; rows of other programs stay. Needs libtpu (`pip install
"scanax[aot]"`, Linux x86-64). Each program is compiled in a process of its own, because the
compiler's flags are read once per process and its analysis can abort. The page has all rows of the
oldest compiler that is recorded, and the cycles of newer ones. With deltanet-tpu (`pip install
deltanet-tpu==0.3.0`, Python 3.12) its kernels are compiled beside ours
(experiments/benchmarks/peers/tpu.py), in programs named `peers_...`.

**What the cycles are.** libtpu's static model walks the final instruction bundles through the grid.
The slope between two sequence lengths, per head and 64 tokens, leaves the prologue out. The model
knows no contention, and its memory is faster than the real one: read the larger of estimate and
bandwidth bound (bytes the kernels move over the chip's rate), and never as a measured time.
**Bytes** are those of the blocks that the kernels fetch and write, counted over the grid, against
inputs once, outputs once, and for a backward pass states at chunk starts written and read once.
**Spills and busy units** are counted in the final bundles (experiments/benchmarks/tpu_bundles.py),
for every generation."""

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.extend
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks import ratchet, tpu_aot_page, tpu_bundles
from experiments.benchmarks.ahead_of_time import TOKENS, TpuProgram, tpu_programs
from experiments.benchmarks.peers import tpu as tpu_peers
from experiments.compiled.hardware import TPU_CHIPS
from experiments.compiled.kernels import kernel_calls
from experiments.compiled.schedules import per_step
from experiments.compiled.topology import one_device_mesh
from experiments.training import command_line
from experiments.training.checkout import CHECKOUT, RESULTS

RATCHET = RESULTS / "tpu_aot_ratchet.json"
RATCHET_KEYS = ("cycles", "vmem_bytes", "spills")


def all_programs() -> Iterator[TpuProgram]:
    """Our programs, then those of peers that can be imported."""
    yield from tpu_programs()
    yield from tpu_peers.programs()


def compile_for(program: TpuProgram, length: int) -> tuple[Any, float]:
    """The compiled program and the seconds that lowering and compiling took."""
    mesh = one_device_mesh(program.generation)
    sharding = NamedSharding(mesh, PartitionSpec())
    function, shapes = program.function_and_shapes(length)
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
        began = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def moved_bytes(call: Any) -> int:
    """Bytes of the blocks that a kernel call fetches and writes: a block stays while its index does
    not change."""
    mapping = call.params["grid_mapping"]
    steps = list(np.ndindex(*mapping.grid))
    total = 0
    for block in mapping.block_mappings:
        index_of = jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr)
        indices = [tuple(map(int, index_of(*step))) for step in steps]
        fetches = 1 + sum(before != now for before, now in itertools.pairwise(indices))
        sizes = [
            x if isinstance(x, int) else getattr(x, "block_size", 1) for x in block.block_shape
        ]
        total += fetches * int(np.prod(sizes)) * block.array_aval.dtype.itemsize
    return total


def minimum_bytes(program: TpuProgram, length: int) -> int:
    """Bytes of inputs and outputs once, and of what is kept between kernels written and read."""
    function, shapes = program.function_and_shapes(length)
    outputs = jax.eval_shape(function, *shapes)
    arrays = jax.tree.leaves([shapes, outputs])
    total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays)
    return total + 2 * program.kept_bytes(length)


def work(program: TpuProgram, folder: str) -> dict[str, Any]:
    """The row of one program; runs in a process of its own, whose compiler dumps into `folder`."""
    row: dict[str, Any] = {
        "name": program.name,
        "generation": program.generation,
        "direction": program.direction,
    }
    lengths = list(program.lengths if program.analyse else program.lengths[:1])
    cycles, glue, moved, minimum, text, kernels, runs = [], [], [], [], "", [], []
    for length in lengths:
        compiled, seconds = compile_for(program, length)
        text = compiled.as_text()
        function, shapes = program.function_and_shapes(length)
        lines = text.splitlines()
        kernels = [line for line in lines if "tpu_custom_call" in line]
        others = [line for line in lines if "tpu_custom_call" not in line]
        cycles.append([sum(_estimates(line)) for line in kernels])
        glue.append(sum(sum(_estimates(line)) for line in others))
        runs.append(list(kernel_calls(jax.make_jaxpr(function)(*shapes))))
        if program.analyse:
            moved.append(sum(moved_bytes(call) for call in runs[-1]))
            minimum.append(minimum_bytes(program, length))
        row |= {"compile_s": round(seconds, 1), "kernels": len(kernels)}
    scoped = r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    row["vmem_bytes"] = max(map(int, re.findall(scoped, "\n".join(kernels))), default=None)
    row |= tpu_bundles.use(folder, tpu_bundles.kernel_names(text))
    if program.analyse:
        if not all(all(parts) for parts in cycles):
            raise RuntimeError(f"the cycle analysis of {program.name} gave {cycles}")
        units = program.units * (lengths[1] - lengths[0]) / TOKENS
        chip = TPU_CHIPS[program.generation]
        assert chip.clock_hz and chip.matmul_flops_per_cycle
        slopes = [(b - a) / units for a, b in zip(*cycles, strict=True)]
        row["cycles"] = round(sum(slopes), 1)
        row["cycles_by_kernel"] = [round(x, 1) for x in slopes]
        row["cycles_per_step"] = per_step(
            runs[0], runs[1], [b - a for a, b in zip(*cycles, strict=True)]
        )
        row["xla_cycles"] = round((glue[1] - glue[0]) / units, 1)
        row["bytes"] = (moved[1] - moved[0]) / units
        row["minimum_bytes"] = (minimum[1] - minimum[0]) / units
        row["bandwidth_bound"] = round(row["bytes"] / chip.hbm_bytes_per_s * chip.clock_hz, 1)
        if program.matmul_flops is not None:
            row["matmul_bound"] = round(program.matmul_flops / chip.matmul_flops_per_cycle, 1)
    return row


def _estimates(line: str) -> list[int]:
    return [int(x) for x in re.findall(r'estimated_cycles":"(\d+)"', line)]


def measure(program: TpuProgram, timeout_s: float = 900) -> dict[str, Any]:
    """The row of `program`. Raises RuntimeError with the compiler's last lines if it does not
    compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.benchmarks.tpu_aot"]
        command += [f"--compile={program.name}", f"--dumps={folder}"]
        command += [f"--analyse={program.analyse}"]
        compiler_flags = tpu_bundles.flags(folder)
        if program.analyse:
            compiler_flags += f" --xla_jf_dump_static_llo_profile_to={folder}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Tests may have set it; cycles are those of optimised code.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "LIBTPU_INIT_ARGS": compiler_flags,
        }
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        last = "\n".join(done.stderr.strip().splitlines()[-30:])
        raise RuntimeError(f"{program.name} did not compile:\n{last[-3000:]}")
    return json.loads(lines[-1])


def report(record_ratchet: bool, only: str = "") -> None:
    """Measures all programs whose name contains `only`; prints and records their rows.

    Recorded rows of other programs, and of other versions of the compiler, stay.
    """
    versions = installed_versions()
    for program in all_programs():
        if only not in program.name:
            continue
        try:
            row = measure(program)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if not program.analyse:
                raise
            # The analysis gave up: what remains is that the program compiles.
            row = measure(replace(program, analyse=False))
            row |= {"analysis": str(error).splitlines()[0][:200]}
        row |= {"versions": versions}
        print(json.dumps(row), flush=True)
        record(row)
        if record_ratchet and program.name not in tpu_peers.names():
            numbers = {key: row[key] for key in RATCHET_KEYS if key in row}
            ratchet.record(RATCHET, versions["libtpu"], row["name"], numbers)


def record(row: dict[str, Any]) -> None:
    """Puts a row in the place of the one of its name and versions; rows of programs that are no
    more go."""
    path = RESULTS / "tpu_aot.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = {(x["name"], x["versions"]["libtpu"]): x for x in [*rows, row]}
    libtpus = sorted({libtpu for _, libtpu in kept})
    names = [*(x.name for x in tpu_programs()), *tpu_peers.names()]
    keys = [(name, libtpu) for libtpu in libtpus for name in names]
    rows = [kept[key] for key in keys if key in kept]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (RESULTS / "tpu_aot.md").write_text(tpu_aot_page.page(rows) + "\n")


def installed_versions() -> dict[str, str]:
    """Versions of all that compiles, by package."""
    packages = ("jax", "jaxlib", "libtpu")
    return {name: importlib.metadata.version(name) for name in packages}


def grown(row: dict[str, Any], libtpu: str) -> list[str]:
    """What of a row exceeds the ratchet, in words; nothing for an unknown version or program."""
    recorded = (ratchet.recorded(RATCHET, libtpu) or {}).get(row["name"], {})
    return [
        f"{key} of {row['name']}: {row[key]}, recorded {recorded[key]}"
        for key in RATCHET_KEYS
        if None not in (recorded.get(key), row.get(key))
        and row[key] > ratchet.GROWTH * recorded[key]
    ]


def main() -> None:
    options = flags.FLAGS
    if not options.compile:
        report(options.ratchet, options.only)
        return
    (chosen,) = (x for x in all_programs() if x.name == options.compile)
    print(json.dumps(work(replace(chosen, analyse=options.analyse), options.dumps)))


if __name__ == "__main__":
    flags.DEFINE_string("only", "", "Only programs with this in their name.")
    flags.DEFINE_bool("ratchet", False, "Record the cycles as those not to exceed.")
    # What the command starts for each program.
    flags.DEFINE_string("compile", "", "Compile this program in this process, print its row.")
    flags.DEFINE_string("dumps", "", "With --compile: folder that the compiler dumps into.")
    flags.DEFINE_bool("analyse", False, "With --compile: ask for cycles.")
    command_line.run(main, cache=False)
