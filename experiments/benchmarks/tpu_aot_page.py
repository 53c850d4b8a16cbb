"""The page of `python -m experiments.benchmarks.tpu_aot`, made from its recorded rows."""

from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.peers import tpu as tpu_peers

HEADING = """\
# TPU kernels, compiled ahead of time

{versions}.
Compiled for, not run on, a TPU. Made by `python -m experiments.benchmarks.tpu_aot`.

Cycles: libtpu's static estimate per head and 64 tokens (slope between two lengths) of the kernels,
and beside it of the XLA operations around them (a lower bound); they are no measured times. Bounds:
bytes that the kernels move over the chip's real memory rate, matmul flops over the unit's rate. A
dash: not analysed (the analysis aborts, or the row is there to compile). Spills: moves of vector
registers to memory and back (fills) in the kernels' final code. Busiest unit: the one of which that
code uses the largest share of slots, and, where recorded, the share of bundles in which any unit
has no slot left (in the others a result is waited for); a loop counts once. MXU, and in newer
compilers MATMUL (multiply) and MATPUSH (load a matrix), is the matrix unit, XLU moves data between
lanes, VALU computes.

Where cycles exceed 1.5 times the larger bound, it is units inside the core that bind, by turns, not
memory:

- `gla`: a matrix of 128 x 128 meets the 128 rows of a chunk only, so that loading it into the
  matrix unit takes as many slots as multiplying by it, or more; longer chunks would multiply more.
  Exact decays come on top: per token a [C, C] of exponentials, whose logs are sums over intervals,
  and transposes (XLU); per channel seven products, one per level of halving, instead of one, whose
  factors are computed and rounded on VALU. Quotients of cumulated decays would save these, and
  overflow.
- `delta`: besides, the inverse of a triangle of 128 rows, a chain in which every product waits for
  the one before, and products with two or three passes where 8 bits would lose what is left of
  alternating sums.
- `selective_scan`: no products of matrices; about 9 operations of VALU per token, channel and state
  forward and 28 backward, which fill it in the loops over tokens
  (ops/selective_scan/pallas_tpu/__init__.py). Backward takes the states at the starts of chunks
  that forward keeps in training; of more than 32 states a channel none are kept, and a first kernel
  makes them.
- `short_convolution` with segments: VALU, for a mask for each tap.

"""
COLUMNS = (
    "program",
    "cycles",
    "by kernel",
    "XLA",
    "memory bound",
    "matmul bound",
    "bytes / minimum",
    "VMEM MB",
    "spills",
    "busiest unit",
    "compile s",
)

PEERS_COLUMNS = (
    "case",
    "kernels of",
    "cycles",
    "XLA",
    "memory bound",
    "over ours",
    "spills",
    "busiest unit",
)
PEERS_HEADING = """

## Beside deltanet-tpu

{versions}, for both sides; deltanet-tpu 0.3.0. bfloat16, K = V = 128, 4 heads, chunks of 128
tokens, no initial state; "forward and backward" has the gradients of all inputs. "over ours"
compares the larger of cycles and memory bound of the kernels. deltanet-tpu computes every case as
its most general one, with gates per channel on erasing and on writing, one head at a time. Cases
are absent where the cycle analysis of a side aborts, as on v5e.

"""


def page(rows: list[dict[str, Any]]) -> str:
    """The report as Markdown: all rows of the oldest compiler, and what newer ones say of their
    cycles."""
    by_libtpu: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["name"] not in tpu_peers.names():
            by_libtpu.setdefault(row["versions"]["libtpu"], {})[row["name"]] = row
    (_, rows_by_name), *newer = sorted(by_libtpu.items())
    columns = [*COLUMNS]
    for libtpu, _ in newer:
        columns += [f"cycles, libtpu {libtpu}", "busiest unit"]
    lines = []
    for name, row in rows_by_name.items():
        others = []
        for _, by_name in newer:
            other = by_name.get(name, {})
            others += [other.get("cycles", "-"), _busiest(other)]
        lines.append([*_cells(row), *others])
    versions = {"jax {jax}, libtpu {libtpu}".format(**x["versions"]) for x in rows}
    text = HEADING.format(versions="; ".join(sorted(versions)))
    return text + _markdown(columns, lines) + _beside_peers(rows)


def _cells(row: dict[str, Any]) -> list[Any]:
    numbers = ["-"] * 6
    if "cycles" in row:
        numbers = [
            row["cycles"],
            " + ".join(map(str, row["cycles_by_kernel"])),
            _xla(row),
            row["bandwidth_bound"],
            row.get("matmul_bound", "-"),
            f"{row['bytes'] / row['minimum_bytes']:.2f}",
        ]
    vmem = "-" if row["vmem_bytes"] is None else f"{row['vmem_bytes'] / 1e6:.1f}"
    spills = row.get("spills", "-")
    return [row["name"], *numbers, vmem, spills, _busiest(row), row["compile_s"]]


def _xla(row: dict[str, Any]) -> Any:
    # Negative: the analysis knew an operation of the shorter program that it did not know of the
    # longer.
    return row["xla_cycles"] if row["xla_cycles"] >= 0 else "-"


def _busiest(row: dict[str, Any]) -> str:
    if "occupancy" not in row:
        return "-"
    unit = max(row["occupancy"], key=row["occupancy"].__getitem__)
    # Rows of before this was counted have no share of full bundles.
    full = f", any {row['full']:.0%}" if "full" in row else ""
    return f"{unit} {row['occupancy'][unit]:.0%}{full}"


def _beside_peers(rows: list[dict[str, Any]]) -> str:
    """Two lines for each case that was measured with the peer: ours, then theirs."""
    by_name = {row["name"]: row for row in rows}
    lines, versions = [], set()
    for case in tpu_peers.CASES:
        names = [tpu_peers.name(side, *case) for side in tpu_peers.SIDES]
        sides = [by_name[name] for name in names if "cycles" in by_name.get(name, {})]
        # Of what the kernels take, the larger of arithmetic and memory.
        times = [max(row["cycles"], row["bandwidth_bound"]) for row in sides]
        if len(sides) < len(names):
            continue
        for side, row, time in zip(tpu_peers.SIDES, sides, times, strict=True):
            versions.add("jax {jax}, libtpu {libtpu}".format(**row["versions"]))
            numbers = [row["cycles"], _xla(row), row["bandwidth_bound"]]
            share = f"{time / times[0]:.2f}"
            label = " ".join(case).replace("_", " ")
            lines.append([label, side, *numbers, share, row["spills"], _busiest(row)])
    if not lines:
        return ""
    text = PEERS_HEADING.format(versions="; ".join(sorted(versions)))
    return text + _markdown(PEERS_COLUMNS, lines)


def _markdown(columns: Sequence[str], lines: list[list[Any]]) -> str:
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *lines)]
    return "\n".join([rows[0], "|---" * len(columns) + "|", *rows[1:]])
