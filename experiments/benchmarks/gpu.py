"""The GPU benchmark: every op on one NVIDIA GPU, first right, then timed, beside what others run.

    python -m experiments.benchmarks.gpu                  # checks, then timings, 20 minutes at most
    python -m experiments.benchmarks.gpu --minutes=5 --only=gated_linear_attention

Writes experiments/results/bench_gpu.json and bench_gpu.md after every case, so that an interrupted
run keeps what it has. A row that was not reached, or cannot run, is a gap in the table, with the
reason where there is one.

**Checks.** The kernels against the float32 reference on the device, outputs and all gradients,
relative L2 error, at ragged lengths with segments. A case that fails is reported with its error and
not timed.

**Timings.** bfloat16 inputs at the shapes that an op's examples name for a GPU. Implementations of
one case take turns; a turn runs a program several times and waits once. Beside ours: `xla`; the
Triton kernels of flash-linear-attention (torch) and of mamba-ssm; the Mosaic kernels of
jax-linear-attention; each where it can be imported. Floors: bytes of inputs and outputs (and,
backward, of cotangents and gradients) over the published memory rate, matmul flops of the
recurrence over the published peak."""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks.cases import (
    Case,
    cases,
    examples_of,
    has_implementation,
    ops_with_examples,
)
from experiments.benchmarks.peers import gpu as peers
from experiments.compiled.hardware import gpu_memory_bytes_per_s, peak_flops
from experiments.training import command_line, run_record
from experiments.training.checkout import RESULTS

MODES = ("forward", "forward+backward")
LIMITS = {
    "float32": {"output": 1e-5, "gradient": 5e-5},
    "bfloat16": {"output": 1e-2, "gradient": 3e-2},
}
TURNS = 5


def all_cases() -> list[Case]:
    """Cases of all ops: the first GPU shape of every op and variant before the second of any."""
    shapes = {op: examples_of(op).GPU_SHAPES for op in ops_with_examples()}
    return [
        case
        for place in range(max(map(len, shapes.values())))
        for op, names in shapes.items()
        for name in names[place : place + 1]
        for case in cases(op, name)
    ]


def implementations(op: str) -> tuple[str, ...]:
    """Names of what is timed of an op; the first is checked, and is "ours" on the page."""
    return ("pallas_gpu", "xla") if has_implementation(op, "pallas_gpu") else ("xla",)


# --- Measuring


def check(case: Case, dtype: str) -> dict[str, Any]:
    """Relative L2 errors of the kernels on the device against the reference fed the same rounded
    inputs."""
    inputs = case.inputs(dtype)
    wide = jax.tree.map(lambda x: x.astype("float32"), inputs)

    def results(implementation: str, inputs: dict[str, Any]) -> dict[str, Any]:
        call = case.call(implementation, segments=True)

        def loss(inputs: dict[str, Any]) -> Any:
            o = jax.tree.map(lambda x: x.astype(jnp.float32), call(inputs))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(o)), o

        with jax.default_matmul_precision("highest"):
            gradients, o = jax.jit(jax.grad(loss, has_aux=True))(inputs)
        return {"output": o} | {f"gradient of {name}": x for name, x in gradients.items()}

    got, wanted = results(implementations(case.op)[0], inputs), results("reference", wide)
    errors = {name: relative_l2(got[name], wanted[name]) for name in got}
    limits = LIMITS[dtype]
    passed = all(
        error <= limits["output" if name == "output" else "gradient"]
        for name, error in errors.items()
    )
    return {
        "check": case.name,
        "sizes": dict(case.sizes),
        "dtype": dtype,
        "errors": errors,
        "passed": passed,
    }


def relative_l2(got: Any, wanted: Any) -> float:
    """Relative L2 error of all arrays of a tree together."""
    a, b = (
        np.concatenate([np.asarray(x.astype(jnp.float32), np.float64).ravel() for x in leaves])
        for leaves in (jax.tree.leaves(got), jax.tree.leaves(wanted))
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def floors(case: Case, inputs: dict[str, Any], mode: str, kind: str) -> dict[str, float | None]:
    """Milliseconds that memory and matmuls take at least; None where the device's rates are not
    known."""
    rate, peak = gpu_memory_bytes_per_s(kind), peak_flops(kind)
    outputs = jax.eval_shape(case.call(implementations(case.op)[-1]), inputs)
    moved, written = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        for arrays in (inputs, outputs)
    )
    # Backward reads the inputs and the output's cotangent and writes a gradient of every input.
    moved = moved + written if mode == "forward" else 3 * moved + 2 * written
    directions = ("forward",) if mode == "forward" else ("forward", "backward")
    flops = sum(case.examples.matmul_flops(case.sizes, direction) for direction in directions)
    return {
        "memory_floor_ms": 1e3 * moved / rate if rate else None,
        "matmul_floor_ms": 1e3 * flops / peak if peak else None,
    }


def programs(
    case: Case, inputs: dict[str, Any], mode: str
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name of implementation or peer a function that compiles its program, ours first."""
    ours = {
        name: lambda name=name: peers.jax_program(case.call(name), inputs, mode)
        for name in implementations(case.op)
    }
    others = {
        name: lambda make=make: make(dict(inputs), mode)
        for name, make in peers.peers(case.op, case.variant).items()
    }
    return ours | others


def time_case(case: Case, mode: str, kind: str) -> list[dict[str, Any]]:
    """Rows of all implementations, taking turns."""
    inputs = case.inputs("bfloat16")
    makers = programs(case, inputs, mode)
    of_case = {"op": case.op, "variant": case.variant, "shape": case.shape, "mode": mode}
    of_case |= {"sizes": dict(case.sizes)} | floors(case, inputs, mode, kind)
    rows, ready = [], {}
    for name, make in makers.items():
        rows.append(of_case | {"implementation": name})
        try:
            program = make()
            _turn(program, 1)
            ready[name] = (program, _repeats(program), [])
        # Peers are other people's packages, which fail in ways of their own (missing, too old, out
        # of memory): that is a gap in the table. Ours, the first row, raises.
        except Exception as error:
            if len(rows) == 1:  # ours
                raise
            rows[-1]["gap"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    for _ in range(TURNS):
        for program, repeats, times in ready.values():
            times.append(_turn(program, repeats) / repeats)
    for row in rows:
        if row["implementation"] in ready:
            times = ready[row["implementation"]][2]
            row["median_ms"], row["min_ms"] = statistics.median(times), min(times)
    return rows


def _turn(program: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of `repeats` runs and one wait."""
    began = time.perf_counter()
    results = [program() for _ in range(repeats)]
    if isinstance(program, peers.TorchProgram):
        program.wait()
    else:
        jax.block_until_ready(results[-1])
    return 1e3 * (time.perf_counter() - began)


def _repeats(program: Callable[[], Any]) -> int:
    """Number of runs that take about 50 ms, at most 20: their results are all in memory."""
    return max(1, min(20, int(50 / max(_turn(program, 1), 1e-3))))


def run(minutes: float, only: str) -> None:
    """Checks, then times, all cases whose name contains `only`, until the time is used up.

    Raises ValueError without an NVIDIA GPU.
    """
    # Torch and jax share the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(f"the GPU benchmark needs an NVIDIA GPU; this machine has {device}")
    until = time.monotonic() + 60 * minutes
    chosen = [case for case in all_cases() if only in case.name]
    record = {"environment": run_record.environment(), "checks": [], "rows": []}
    passed: dict[str, bool] = {}
    for case in chosen:
        if case.name in passed:
            continue
        passed[case.name] = True
        for dtype in ("float32", "bfloat16"):
            result = check(case.at("ragged"), dtype)
            passed[case.name] &= result["passed"]
            record["checks"].append(result)
            print(json.dumps(result), flush=True)
    save(record)
    for case in chosen:
        for mode in MODES:
            if not passed[case.name] or time.monotonic() > until:
                continue
            rows = time_case(case, mode, device.device_kind)
            record["rows"] += rows
            print(json.dumps(rows), flush=True)
            save(record)


# --- The page


def save(record: dict[str, Any]) -> None:
    """Writes the record and its page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench_gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "bench_gpu.md").write_text(page(record))


HEADING = """\
# GPU kernels, measured

{environment}

Made by `python -m experiments.benchmarks.gpu`. Milliseconds, median of five turns, bfloat16 inputs;
in brackets how many times ours. Shapes are those of the ops' examples.py. Floors: bytes of inputs
and outputs over the memory's rate, matmul flops over the peak.

"""


def page(record: dict[str, Any]) -> str:
    """The benchmark as Markdown; what was not measured says so."""
    environment = record.get("environment")
    where = json.dumps(environment) if environment else "Not measured yet on any GPU."
    lines = [HEADING.format(environment=where)]
    if record.get("checks"):
        lines.append("| check | dtype | largest error | passed |\n|---|---|---|---|\n")
        for row in record["checks"]:
            worst = max(row["errors"], key=lambda name: row["errors"][name])
            lines.append(
                f"| {row['check']} | {row['dtype']} | {row['errors'][worst]:.1e}"
                f" ({worst}) | {'yes' if row['passed'] else '**no**'} |\n"
            )
        lines.append("\n")
    measured: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in record.get("rows", ()):
        key = tuple(row[name] for name in ("op", "variant", "shape", "mode"))
        measured.setdefault(key, []).append(row)
    lines.append("| op | shape | pass | ours | others | floors: memory, matmul |\n")
    lines.append("|---|---|---|---|---|---|\n")
    for case in all_cases():
        for mode in MODES:
            rows = measured.get((case.op, case.variant, case.shape, mode))
            lines.append(f"| {case.name} | {case.shape} | {mode} | {_cells(rows)} |\n")
    return "".join(lines)


def _cells(rows: list[dict[str, Any]] | None) -> str:
    if not rows:
        return "not measured | | "
    ours, *others = rows
    cells = []
    for row in others:
        time = row.get("median_ms")
        text = row["gap"] if time is None else f"{time:.2f}"
        if time is not None and "median_ms" in ours:
            text += f" ({time / ours['median_ms']:.2f}x)"
        cells.append(f"{row['implementation']} {text}")
    memory, matmul = (
        "?" if ours[name] is None else f"{ours[name]:.2f}"
        for name in ("memory_floor_ms", "matmul_floor_ms")
    )
    return f"{ours['median_ms']:.2f} | {'; '.join(cells)} | {memory}, {matmul}"


def main() -> None:
    run(flags.FLAGS.minutes, flags.FLAGS.only)


if __name__ == "__main__":
    flags.DEFINE_float("minutes", 20, "For how long.", lower_bound=0)
    flags.DEFINE_string("only", "", "Only cases with this in their name.")
    command_line.run(main)
