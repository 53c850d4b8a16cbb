"""The page of `python -m experiments.benchmarks.gpu_aot`, made from its recorded rows."""

from collections.abc import Sequence
from typing import Any

HEADING = """\
# GPU kernels, compiled ahead of time

{versions}. Compiled for, not run on, a GPU. Made by `python -m experiments.benchmarks.gpu_aot`.
Registers and spilled bytes (stores and loads) are per thread. Resident: programs that one
multiprocessor holds at once. Temporary: memory beside inputs and outputs, such as states at the
boundaries of chunks.

"""
COLUMNS = (
    "program",
    "kernel",
    "programs",
    "threads",
    "registers",
    "spilled",
    "shared KB",
    "resident",
    "temporary MB",
    "compile s",
)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"{'|---' * len(COLUMNS)}|"]
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
