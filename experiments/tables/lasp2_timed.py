"""The ways of lasp2_scaling as far as time on virtual devices can tell them apart: how work grows
with the length, and what exchanging costs where links cost nothing.

Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", 2025,
arXiv 2502.07563.

    python -m experiments.reproduce --table=lasp2_timed --scale=cpu
"""

from collections.abc import Mapping
from typing import Any

from experiments.reporting.table import Cell, Computation

TITLE = "Sequence parallelism over eight virtual devices, timed"
METRIC = (
    "Time of one layer with its gradients over that of LASP-2, both cut over 8 virtual devices of"
    " one CPU, medians of rounds in turns; the row of LASP-2 is milliseconds. Virtual devices share"
    " the cores: times show the work of all and the cost of exchanging, not the links of a pod, nor"
    " the waiting of a ring"
)
# Keys of the numbers that sequence_timing measures.
WAYS = (
    "LASP-2",
    "LASP, a ring",
    "pipelined ring",
    "linear, one device",
    "softmax, LASP-2H",
    "softmax, ring attention",
    "softmax, one device",
)
SCALES = {"cpu": "complete. One sequence, 4 heads of 64, float32."}
LENGTHS = {"1K": 2**10, "2K": 2**11, "4K": 2**12}


def cells(scale: str) -> list[Cell]:
    del scale
    first = WAYS[0]
    return [
        Computation(
            f"{way} (ms)" if way == first else way,
            f"{label} tokens",
            "sequence_timing:measure",
            f"{'ms' if way == first else 'ratio'}/{way}",
            overrides={"length": length},
        )
        for label, length in LENGTHS.items()
        for way in WAYS
    ]


def draw(axes: Any, results: list[tuple[Cell, Mapping[str, Any]]]) -> None:
    """Milliseconds against the length, a line for every way."""
    rows = {cell.overrides["length"]: row for cell, row in results}
    lengths = sorted(rows)
    for way in WAYS:
        times = [rows[length]["evaluations"]["ms"][way][0] for length in lengths]
        axes.plot(lengths, times, "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
    axes.legend(fontsize=7)
