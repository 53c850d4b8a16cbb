"""What XLA dumps of a GPU program, and what NVIDIA's assembler says of it: what each kernel takes.

XLA writes the PTX of every kernel and the order of their launches, with grids, threads and shared
memory. `ptxas -v` gives registers and spills, and only it decides about them."""

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compiled.hardware import (
    GPUS,
    PROGRAMS_PER_MULTIPROCESSOR,
    REGISTERS_PER_MULTIPROCESSOR,
    THREADS_PER_MULTIPROCESSOR,
)

LAUNCH = re.compile(
    r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\]\s+shared_memory:"
    r" (\d+) bytes"
)
FUNCTION = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill"
    r" loads.*?Used (\d+) registers",
    re.DOTALL,
)


def kernels(folder: Path, architecture: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each Pallas kernel of a dump takes, in the order of their launches; `names`: those that
    the program runs.

    Raises RuntimeError if one of them is not launched or not assembled: its numbers would be
    missed in silence."""
    found, code = launches(folder), assembled(folder, architecture)
    # XLA numbers the second and later ones of a name.
    ours = [(re.sub(r"__\d+$", "", function), function, sizes) for function, sizes in found]
    ours = [launch for launch in ours if launch[0] in names]
    missed = set(names) - {name for name, _, _ in ours}
    missed |= {function for _, function, _ in ours if function not in code}
    if missed:
        raise RuntimeError(
            f"the dump has no launch, or no code, of {', '.join(sorted(missed))}; launched are"
            f" {', '.join(function for function, _ in found)}, assembled {', '.join(code)}"
        )
    rows = []
    for name, function, (x, y, z, threads, shared) in ours:
        registers, spilled = code[function]
        rows.append(
            {
                "kernel": name,
                "programs": x * y * z,
                "threads": threads,
                "registers": registers,
                "spilled_bytes": spilled,
                "shared_bytes": shared,
                "resident": resident(architecture, registers, threads, shared),
            }
        )
    return rows


def launches(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """(function, (three sizes of the grid, threads, bytes of shared memory)) of every launch."""
    text = "".join(file.read_text() for file in sorted(folder.glob("*thunk_sequence.txt")))
    return [(function, tuple(map(int, sizes))) for function, *sizes in LAUNCH.findall(text)]


def assembled(folder: Path, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of every function of a dump."""
    found = {}
    for file in sorted(folder.glob("*.ptx")):
        if not file.read_text().strip("\0 \n"):
            continue  # a module of constants alone has no code
        for function, stored, loaded, registers in FUNCTION.findall(assemble(file, architecture)):
            found[function] = int(registers), int(stored) + int(loaded)
    return found


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


def ptxas() -> str | None:
    """The assembler of the package nvidia-cuda-nvcc, else one on the path."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name == "ptxas"]
    return found[0] if found else shutil.which("ptxas")
