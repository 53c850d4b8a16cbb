"""Time and memory of the ops, forward and forward+backward, at shapes of their examples.

    python -m experiments.benchmarks.ops                 # all ops at the shapes named "cpu"
    python -m experiments.benchmarks.ops --ops=delta_rule --implementations=xla --json=rows.json
    python -m experiments.benchmarks.ops --peers         # beside jax-linear-attention, if installed
    python -m experiments.benchmarks.ops --processes=7   # the medians of seven processes

Every case is compiled first; then all implementations (and the peer) of one case take turns, so
that a machine that slows down slows all of them. A turn runs its program once unmeasured, which
brings code, data and memory back into caches that another program had, and then for about a tenth
of a second. Reported are the median over the turns and the minimum, per run, the ratio of medians
to ours, and the temporary memory of the compiled program. Hardware and versions are printed and
recorded. From process to process a ratio differs by a fifth or more: recorded are medians over
several, and of the ratio the least and the largest."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.benchmarks.cases import Case, cases, examples_of, ops_with_examples, sum_of_squares
from experiments.benchmarks.peers import cpu as peers
from experiments.training import command_line, run_record

IMPLEMENTATIONS = ("xla", "reference")
MODES = ("forward", "forward+backward")
TURN_S = 0.1


def measure(
    case: Case, functions: dict[str, Callable[[dict[str, Any]], Any]], rounds: int
) -> list[dict[str, Any]]:
    """Rows of one case: per function, forward, and forward with the gradients of all inputs."""
    inputs = case.inputs("float32")
    rows = []
    for mode in MODES:
        programs = {}
        for name, function in functions.items():
            program = function if mode == "forward" else jax.grad(sum_of_squares(function))
            began = time.perf_counter()
            compiled = jax.jit(program).lower(inputs).compile()
            compile_s = time.perf_counter() - began
            jax.block_until_ready(compiled(inputs))
            programs[name] = (compiled, compile_s, [])
        for _ in range(rounds):
            for compiled, _, times in programs.values():
                times.append(_turn(compiled, inputs))
        ours = statistics.median(next(iter(programs.values()))[2])
        for name, (compiled, compile_s, times) in programs.items():
            memory = compiled.memory_analysis()
            rows.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "variant": case.variant,
                    "mode": mode,
                    "implementation": name,
                    "median_ms": statistics.median(times),
                    "min_ms": min(times),
                    "over_first": statistics.median(times) / ours,
                    "temporary_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
                    "compile_s": compile_s,
                }
            )
    return rows


def _turn(program: Callable[..., Any], inputs: dict[str, Any]) -> float:
    """Milliseconds of one run of `program`, after one that is not counted."""
    jax.block_until_ready(program(inputs))
    began = time.perf_counter()
    runs = 0
    while runs == 0 or time.perf_counter() - began < TURN_S:
        jax.block_until_ready(program(inputs))
        runs += 1
    return 1e3 * (time.perf_counter() - began) / runs


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [
        (
            "| op | shape | variant | mode | implementation | median ms | min ms | over"
            " first | temp MB |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = "?" if row["temporary_mb"] is None else f"{row['temporary_mb']:.0f}"
        ratio = f"{row['over_first']:.2f}"
        if "over_first_from_to" in row:
            least, most = row["over_first_from_to"]
            ratio += f" ({least:.2f}-{most:.2f})"
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['variant']} | {row['mode']} |"
            f" {row['implementation']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} |"
            f" {ratio} | {memory} |"
        )
    return "\n".join(lines)


def in_processes(count: int) -> list[dict[str, Any]]:
    """Rows of this command line, measured by as many processes, one after another."""
    runs = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "experiments.benchmarks.ops", *sys.argv[1:]]
            subprocess.run([*command, "--processes=1", f"--json={file}"], check=True)
            runs.append(json.loads(file.read_text())["rows"])
    return median_rows(runs)


def median_rows(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows with medians over the runs, the least time, and the least and the largest ratio."""
    rows = []
    for same in zip(*runs, strict=True):
        ratios = [row["over_first"] for row in same]
        medians = {
            name: statistics.median(row[name] for row in same)
            for name in ("median_ms", "over_first", "compile_s")
        }
        least = min(row["min_ms"] for row in same)
        spread = {"over_first_from_to": [min(ratios), max(ratios)]}
        rows.append(same[0] | medians | {"min_ms": least} | spread)
    return rows


def main() -> None:
    options = flags.FLAGS
    known_ops = ops_with_examples()
    for op in options.ops:
        if op not in known_ops:
            raise ValueError(f"--ops must be of {', '.join(known_ops)}; got {op!r}")
    known_shapes = sorted({name for op in options.ops for name in examples_of(op).SHAPES})
    for shape in options.shapes:
        if shape not in known_shapes:
            raise ValueError(f"--shapes must be of {', '.join(known_shapes)}; got {shape!r}")
    if options.peers:
        peers.check_installed()
    environment = run_record.environment()
    if options.processes > 1:
        environment["processes"] = options.processes
        rows = in_processes(options.processes)
        print(format_rows(rows))
    else:
        rows = []
        for case in (x for op in options.ops for shape in options.shapes for x in cases(op, shape)):
            functions = {name: case.call(name) for name in options.implementations}
            if options.peers:
                functions |= peers.functions(case.op, case.variant)
            measured = measure(case, functions, options.rounds)
            rows += measured
            print(format_rows(measured), flush=True)
    print(json.dumps(environment))
    if options.json:
        record = {"environment": environment, "rows": rows}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    flags.DEFINE_list("ops", list(ops_with_examples()), "Ops to measure.")
    flags.DEFINE_list("shapes", ["cpu"], "Names of shapes in the ops' examples.py.")
    flags.DEFINE_list(
        "implementations", list(IMPLEMENTATIONS), "The first is what the others are compared with."
    )
    flags.DEFINE_integer("rounds", 7, "Turns of every program.", lower_bound=1)
    flags.DEFINE_integer("processes", 1, "Fresh processes that measure everything.", lower_bound=1)
    flags.DEFINE_bool("peers", False, "Measure jax-linear-attention beside ours.")
    flags.DEFINE_string("json", "", "File to write all rows to.")
    command_line.run(main, cache=False)
